// Blocking threads that share the parts of one call; idle ones sleep.
//
// Forking is safe: a child starts threads of its own when it needs them. If the system has no room
// for another thread, the existing ones do the work, in the last resort the caller alone. Work must
// not call malloc or have thread_local variables: glibc ends the process if it finds no memory for
// a thread's own variables, and it reserves 64 MiB of addresses for each thread that allocates.
#pragma once

#include <stdint.h>

#include <atomic>

namespace engraphy {

class ThreadPool {
  public:
    ThreadPool() noexcept;
    ~ThreadPool();  // no call may be under way
    ThreadPool(const ThreadPool &) = delete;

    // The parts of one call: `next` is called by each thread that takes part, until it gives -1.
    class Parts {
      public:
        explicit Parts(int64_t count) : count_(count) {}
        int64_t next() {
            const int64_t i = next_.fetch_add(1, std::memory_order_relaxed);
            return i < count_ ? i : -1;
        }

      private:
        std::atomic<int64_t> next_{0};
        const int64_t count_;
    };

    // share(parts) by this thread and at most `most` - 1 others, fewer where the system starts no
    // more; returns when all parts are done. It must not throw. Several threads may call at once.
    template <class Share> void shared(int64_t count, int most, const Share &share) {
        run(
            count, most,
            [](const void *context, Parts &parts) { (*(const Share *)context)(parts); }, &share);
    }

    // work(i) for i from 0 to count - 1, in the same way.
    template <class Work> void each(int64_t count, int most, const Work &work) {
        shared(count, most, [&work](Parts &parts) {
            for (int64_t i; (i = parts.next()) >= 0;) work(i);
        });
    }

    struct State;

  private:
    void run(int64_t count, int most, void (*work)(const void *, Parts &), const void *context);
    State *state();
    std::atomic<State *> state_;
};

// The threads for what is arithmetic: as many as `set_threads` said. Never destroyed, since it may
// be in use when the process ends.
ThreadPool &computing();
int threads();
void set_threads(int count);

// Into how many parts to cut the work on `count` rows.
int parts_of(int64_t count);

// Bytes of an output from which on it is written past the caches: more than a core has for itself.
constexpr int64_t streamed_from = 8 << 20;

}  // namespace engraphy
