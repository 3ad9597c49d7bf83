// Memory of tensors that is kept when they are freed, in place of asking the system for the same pages at every step.
//
// A tensor of LEAST bytes or more is cut from segments that belong to tensors alone: from the smallest free piece that
// holds it, and what is freed joins its free neighbours. So small objects that live long do not stand between large
// ones that come and go, as in a common heap, where tensors of ever new sizes leave holes that nothing fits into.
// The system gets back what is free where it is asked for; the addresses stay.

#include <c10/core/CPUAllocator.h>
#include <malloc.h>
#include <pthread.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <map>
#include <mutex>
#include <set>

namespace truetune {
namespace {

using Bytes = size_t;

constexpr Bytes LINE = 64, LEAST = Bytes(1) << 16, SEGMENT = Bytes(32) << 20, PAGE = Bytes(2) << 20;

class Kept final : public c10::Allocator {
 public:
  c10::DataPtr allocate(Bytes bytes) override {
    void* data = bytes < LEAST ? plain().raw_allocate(bytes) : take((bytes + LINE - 1) / LINE * LINE);
    return {data, data, &Kept::give_back, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &Kept::give_back; }
  void copy_data(void* to, const void* from, Bytes bytes) const override { default_copy_data(to, from, bytes); }

  // Bytes of all segments, and of those that are free.
  std::vector<int64_t> held() {
    const std::lock_guard<std::mutex> guard(lock_);
    Bytes all = 0, unused = 0;
    for (const auto& [place, piece] : pieces_) {
      all += piece.bytes;
      if (piece.free) unused += piece.bytes;
    }
    return {int64_t(all), int64_t(unused)};
  }

  // Gives the system the whole pages of what is free.
  void release() {
    const std::lock_guard<std::mutex> guard(lock_);
    for (const auto& [bytes, data] : free_) {
      const auto first = (reinterpret_cast<uintptr_t>(data) + PAGE - 1) / PAGE * PAGE;
      const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / PAGE * PAGE;
      if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_DONTNEED);
    }
  }

  static Kept& only() {
    static Kept* kept = [] {
      pthread_atfork([] { only().lock_.lock(); }, [] { only().lock_.unlock(); }, [] { only().lock_.unlock(); });
      return new Kept;  // never destroyed, since tensors may outlive everything
    }();
    return *kept;
  }

 private:
  struct Piece {
    Bytes bytes;
    bool free;
  };
  using Place = std::map<char*, Piece>::iterator;

  std::mutex lock_;
  std::map<char*, Piece> pieces_;  // neighbours in memory are neighbours here
  std::set<std::pair<Bytes, char*>> free_;

  static c10::Allocator& plain() { return *c10::GetDefaultCPUAllocator(); }

  static void give_back(void* data) {
    if (!only().give(static_cast<char*>(data))) plain().raw_deallocate(data);
  }

  char* take(Bytes bytes) {
    const std::lock_guard<std::mutex> guard(lock_);
    auto found = free_.lower_bound({bytes, nullptr});
    if (found == free_.end()) {
      grow(bytes);
      found = free_.lower_bound({bytes, nullptr});
    }
    const Place place = pieces_.find(found->second);
    free_.erase(found);
    const Bytes left = place->second.bytes - bytes;
    place->second = {bytes, false};
    if (left > 0) add(place->first + bytes, left);
    return place->first;
  }

  // Whether it stood here.
  bool give(char* data) {
    const std::lock_guard<std::mutex> guard(lock_);
    const Place place = pieces_.find(data);
    if (place == pieces_.end()) return false;
    join(place);
    return true;
  }

  void grow(Bytes bytes) {
    const Bytes size = (std::max(bytes, SEGMENT) + PAGE - 1) / PAGE * PAGE;
    void* segment = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK_WITH(OutOfMemoryError, segment != MAP_FAILED, "there is no memory for a tensor of ", bytes, " bytes; take shorter documents or fewer tokens at a time");
    join(pieces_.insert({static_cast<char*>(segment), {size, false}}).first);
  }

  void add(char* data, Bytes bytes) {
    pieces_[data] = {bytes, true};
    free_.insert({bytes, data});
  }

  // Frees a piece, which becomes one with its free neighbours.
  void join(Place place) {
    char* data = place->first;
    Bytes bytes = place->second.bytes;
    const auto swallow = [&](Place other) {
      bytes += other->second.bytes;
      free_.erase({other->second.bytes, other->first});
      pieces_.erase(other);
    };
    const Place after = std::next(place);
    if (after != pieces_.end() && after->second.free && data + bytes == after->first) swallow(after);
    if (place != pieces_.begin()) {
      const Place before = std::prev(place);
      if (before->second.free && before->first + before->second.bytes == data) {
        data = before->first;
        swallow(before);
      }
    }
    pieces_.erase(place);
    add(data, bytes);
  }
};

// From now on tensors of the processor are allocated so, or as torch does.
void keep_memory(bool on) {
  c10::SetCPUAllocator(on ? static_cast<c10::Allocator*>(&Kept::only()) : c10::GetDefaultCPUAllocator());
}

void release_memory() {
  Kept::only().release();
  malloc_trim(0);
}

}  // namespace
}  // namespace truetune

TORCH_LIBRARY_FRAGMENT(TRUETUNE_LIBRARY, library) {
  library.def("keep_memory(bool on) -> ()", truetune::keep_memory);
  library.def("release_memory() -> ()", truetune::release_memory);
  library.def("memory_held() -> int[]", [] { return truetune::Kept::only().held(); });
}
