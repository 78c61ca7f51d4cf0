// Blocking threads that share the parts of one call; idle ones sleep. Forking is safe: a child starts threads of its
// own when it needs them.
#pragma once

#include <stdint.h>

#include <atomic>

namespace engraphy {

class ThreadPool {
  public:
    ThreadPool() noexcept;
    ~ThreadPool();  // no call may be under way
    ThreadPool(const ThreadPool &) = delete;

    // work(i) for i from 0 to count - 1, by this thread and at most `most` - 1 others; returns when all are done. Work
    // must not throw. Several threads may call at once.
    template <class Work> void each(int64_t count, int most, const Work &work) {
        run(count, most, [](const void *context, int64_t i) { (*(const Work *)context)(i); }, &work);
    }

    struct State;

  private:
    void run(int64_t count, int most, void (*work)(const void *, int64_t), const void *context);
    State *state();
    std::atomic<State *> state_;
};

// The threads for what is arithmetic: as many as `set_threads` said. Never destroyed, since it may be in use when the
// process ends.
ThreadPool &computing();
int threads();
void set_threads(int count);

// Into how many parts to cut the work on `count` rows.
int parts_of(int64_t count);

// Bytes of an output from which on it is written past the caches: more than a core has for itself.
constexpr int64_t streamed_from = 8 << 20;

}  // namespace engraphy
