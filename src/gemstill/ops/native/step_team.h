// Threads of one parallel_for that go through many small jobs together: starting them anew for each would cost more
// than the jobs.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

namespace gemstill {

// A member stands for one or several of `shares` numbers that parallel_for hands out; all of them run at once, or one
// of them stands for all.
class Team {
 public:
  explicit Team(int64_t shares) : shares_(shares) {}

  // Calls f(begin, end) for parts of [0, count), each in some member; all have ended when this returns. Every member
  // calls this, with the same job. Parts become shorter, down to `least`, so that all end at about the same time.
  template <class F>
  void share(int64_t own, int64_t count, int64_t least, const F& f) {
    if (own == shares_) return f(0, count);
    int64_t begin = next_.load(std::memory_order_relaxed);
    while (begin < count) {
      const int64_t end = std::min(count, begin + std::max(least, (count - begin) / (2 * shares_)));
      if (!next_.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
      f(begin, end);
      begin = next_.load(std::memory_order_relaxed);
    }
    wait(own);
  }

 private:
  void wait(int64_t own) {
    const uint32_t turn = turn_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(own, std::memory_order_acq_rel) + own == shares_) {
      arrived_.store(0, std::memory_order_relaxed);
      next_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; spins++) {
      if (spins > 4000) {
        std::this_thread::yield();  // the processor is shared: whoever is waited for may want it
      } else {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      }
    }
  }

  const int64_t shares_;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> turn_{0};
};

}  // namespace gemstill
