#include "threads.hpp"

#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <new>
#include <vector>

namespace engraphy {
namespace {

constexpr int64_t rows_worth_a_thread = 2048;
constexpr int parts_a_thread =
    8;  // a thread that is late, woken or held up by others, then leaves more to the rest

// Of a thread: kernels need a few KiB, a signal's frame with AMX registers 11 KiB; with the 8 MiB
// that are usual, 128 threads take a GiB of addresses.
constexpr size_t stack_bytes = 256 << 10;
constexpr size_t left_to_others = 32
                                  << 20;  // addresses that have to be free when a thread is started

std::atomic<uint64_t> forks{0};
std::atomic<int> thread_count{1};

// One call. It lies on the stack of the caller, which returns only when no thread works on it.
struct Job {
    Job(void (*work)(const void *, ThreadPool::Parts &), const void *context, int64_t count)
        : work(work), context(context), parts(count) {}

    void (*work)(const void *, ThreadPool::Parts &);
    const void *context;
    ThreadPool::Parts parts;
    int places = 0;  // for more threads
    int workers = 0;
    std::condition_variable done;

    void take_part() { work(context, parts); }
};

// Whether there are addresses for one more thread, and for what else the process does.
bool has_room() {
    const size_t size = stack_bytes + left_to_others;
    void *const memory =
        mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return false;
    munmap(memory, size);
    return true;
}

}  // namespace

struct ThreadPool::State {
    const uint64_t born_after = forks.load();
    std::mutex mutex;
    std::condition_variable wake;
    std::vector<Job *> jobs;
    std::vector<pthread_t> threads;
    int idle = 0;
    bool ending = false;

    Job *open_job() {
        for (Job *job : jobs)
            if (job->places) return job;
        return nullptr;
    }

    void serve() {
        std::unique_lock lock(mutex);
        for (;;) {
            Job *job = open_job();
            if (job) {
                job->places--;
                job->workers++;
                lock.unlock();
                job->take_part();
                lock.lock();
                if (!--job->workers) job->done.notify_one();
            } else if (ending) {
                return;
            } else {
                idle++;
                wake.wait(lock);
                idle--;
            }
        }
    }

    // With the mutex held. Signals are for the threads of Python; those of a fault reach a thread
    // in any case, and blocking them would end the process.
    void start(int wanted) {
        sigset_t others, before;
        sigfillset(&others);
        for (int fault : {SIGBUS, SIGSEGV, SIGFPE, SIGILL, SIGTRAP}) sigdelset(&others, fault);
        pthread_sigmask(SIG_SETMASK, &others, &before);
        pthread_attr_t small;
        const bool known =
            !pthread_attr_init(&small) && !pthread_attr_setstacksize(&small, stack_bytes);
        for (int i = 0; known && i < wanted && has_room() && start_one(small); i++) {}
        pthread_attr_destroy(&small);
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

    // False if the system has no more threads for this process: those there are do the work.
    bool start_one(const pthread_attr_t &attributes) {
        try {
            threads.emplace_back();
        } catch (const std::bad_alloc &) {
            return false;
        }
        const auto serve_it = [](void *state) -> void * {
            return ((State *)state)->serve(), nullptr;
        };
        if (!pthread_create(&threads.back(), &attributes, serve_it, this)) return true;
        threads.pop_back();
        return false;
    }
};

ThreadPool::ThreadPool() noexcept : state_(nullptr) {
    static const bool counting = (pthread_atfork(nullptr, nullptr, [] { forks++; }), true);
    (void)counting;
}

ThreadPool::~ThreadPool() {
    State *state = state_.load();
    if (!state || state->born_after != forks.load()) return;  // its threads stayed with the parent
    {
        std::lock_guard lock(state->mutex);
        state->ending = true;
    }
    state->wake.notify_all();
    for (const pthread_t thread : state->threads) pthread_join(thread, nullptr);
    delete state;
}

// What the parent left is abandoned: its mutex may be locked for ever.
ThreadPool::State *ThreadPool::state() {
    State *state = state_.load();
    if (state && state->born_after == forks.load()) return state;
    State *fresh = new State;
    if (state_.compare_exchange_strong(state, fresh)) return fresh;
    delete fresh;
    return state;
}

void ThreadPool::run(int64_t count, int most, void (*work)(const void *, Parts &),
                     const void *context) {
    const int others = int(std::min<int64_t>(most, count)) - 1;
    Job job(work, context, count);
    if (others < 1) return job.take_part();
    State *state = this->state();
    {
        std::lock_guard lock(state->mutex);
        state->jobs.push_back(&job);
        job.places = others;
        const int missing = std::min(others - state->idle, most - 1 - int(state->threads.size()));
        if (missing > 0) state->start(missing);
        for (int i = std::min(others, state->idle); i > 0; i--) state->wake.notify_one();
    }
    job.take_part();
    std::unique_lock lock(state->mutex);
    state->jobs.erase(std::find(state->jobs.begin(), state->jobs.end(), &job));
    job.done.wait(lock, [&job] { return !job.workers; });
}

ThreadPool &computing() {
    static ThreadPool *const pool = new ThreadPool;
    return *pool;
}

int threads() { return thread_count.load(std::memory_order_relaxed); }
void set_threads(int count) { thread_count = count; }

int parts_of(int64_t count) {
    const int most = threads() > 1 ? threads() * parts_a_thread : 1;
    return int(std::clamp<int64_t>(count / rows_worth_a_thread, 1, most));
}

}  // namespace engraphy
