// Threads of one parallel_for that go through many small jobs together: starting them anew for each would cost more
// than the jobs.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace gemstill {

struct Stretch {  // of memory
  const uint8_t* data = nullptr;
  int64_t size = 0;
};

struct Member {  // stands for shares [first, last) of those that parallel_for hands out
  int64_t first, last;
};

// All members run at once, or one of them stands for all shares.
class Team {
 public:
  explicit Team(int64_t shares) : shares_(shares), taken_(shares) {}

  int64_t first_of(int64_t share, int64_t count) const { return count * share / shares_; }

  // Calls f(begin, end, stop) for parts of [0, count), each in some member, which goes on up to `stop`; then after() in
  // one of them. All has ended when this returns. Every member calls this, with the same job. Each has a range of its
  // own and goes through it in order, in parts that become shorter, down to `least`; who is ready helps the others from
  // their ends, and, when there is nothing left to do, asks for `next`.
  template <class F, class G>
  void share(const Member& me, int64_t count, int64_t least, const F& f, const G& after, const Stretch& next = {}) {
    if (me.last - me.first == shares_) {
      f(0, count, count);
      after();
      return;
    }
    for (int64_t i = 0; i < shares_; i++) work(me, (me.first + i) % shares_, count, least, f);
    wait(me, after, next);
  }

 private:
  template <class F>
  void work(const Member& me, int64_t share, int64_t count, int64_t least, const F& f) {
    const int64_t begin = first_of(share, count), end = first_of(share + 1, count);
    const bool own = me.first <= share && share < me.last;
    std::atomic<uint64_t>& taken = taken_[share].ends;  // from the end in the upper half, from the beginning in the lower
    uint64_t seen = taken.load(std::memory_order_relaxed);
    for (;;) {
      const int64_t front = begin + int64_t(seen & 0xffffffff), back = end - int64_t(seen >> 32), left = back - front;
      if (left <= 0) return;
      const int64_t size = std::min(left, std::max(least, left / 2));
      if (!taken.compare_exchange_weak(seen, seen + (own ? uint64_t(size) : uint64_t(size) << 32),
                                       std::memory_order_relaxed)) {
        continue;
      }
      own ? f(front, front + size, end) : f(back - size, back, back);
      seen = taken.load(std::memory_order_relaxed);
    }
  }

  template <class G>
  void wait(const Member& me, const G& after, const Stretch& next) {
    const uint32_t turn = turn_.load(std::memory_order_relaxed);
    const int64_t own = me.last - me.first;
    if (arrived_.fetch_add(own, std::memory_order_acq_rel) + own == shares_) {
      after();
      arrived_.store(0, std::memory_order_relaxed);
      for (Taken& one : taken_) one.ends.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    int64_t asked = 0;
    for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; spins++) {
      if (asked < next.size) {
        for (const int64_t stop = asked + 256; asked < stop; asked += 64) __builtin_prefetch(next.data + asked, 0, 2);
      } else if (spins > 4000) {
        std::this_thread::yield();  // the processor is shared: whoever is waited for may want it
      } else {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      }
    }
  }

  struct alignas(64) Taken {
    std::atomic<uint64_t> ends{0};
  };

  const int64_t shares_;
  std::vector<Taken> taken_;
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> turn_{0};
};

}  // namespace gemstill
