// A pool of threads that wait for the next layer in a loop before they sleep: a layer takes
// microseconds, waking a thread takes as long.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>
#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Barrier {
  public:
    explicit Barrier(int threads) : threads(threads) {}
    void wait() {
        if (threads == 1)
            return;
        const int turn = generation.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
            arrived.store(0, std::memory_order_relaxed);
            generation.store(turn + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; generation.load(std::memory_order_acquire) == turn; ++spins) {
            relax();
            if (spins > 100) // the other thread may be waiting for this very core
                std::this_thread::yield();
        }
    }
    const int threads;

  private:
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<int> generation{0};
};

class Pool {
  public:
    using Work = void (*)(void *context, int thread);

    // One for the process, never destroyed: its threads may wait until the very end. A forked
    // child has none of them and makes its own.
    static Pool &instance() {
        static std::mutex guard;
        static Pool *pool = nullptr;
        std::lock_guard<std::mutex> lock(guard);
        if (pool == nullptr || pool->process != getpid())
            pool = new Pool;
        return *pool;
    }

    // Calls work(context, 0 .. threads - 1), the first of them here. False, and nothing is called, if
    // the system does not give so many threads.
    bool run(int threads, Work given_work, void *given_context) {
        std::lock_guard<std::mutex> one_at_a_time(running);
        try {
            for (; started < threads - 1; ++started)
                std::thread(&Pool::serve, this, started + 1, epoch.load()).detach();
        } catch (const std::system_error &) {
            return false;
        }
        if (threads > 1) {
            {
                std::lock_guard<std::mutex> lock(sleeping);
                work = given_work, context = given_context, wanted = threads;
                pending.store(started, std::memory_order_relaxed);
                epoch.fetch_add(1, std::memory_order_release);
            }
            wake.notify_all();
        }
        given_work(given_context, 0);
        for (int spins = 0; threads > 1 && pending.load(std::memory_order_acquire) > 0; ++spins) {
            relax();
            if (spins > 100)
                std::this_thread::yield();
        }
        return true;
    }

  private:
    void serve(int thread, uint64_t seen) {
        for (;;) {
            for (int spins = 0; spins < 2000 && epoch.load(std::memory_order_acquire) == seen;
                 ++spins)
                relax();
            if (epoch.load(std::memory_order_acquire) == seen) {
                std::unique_lock<std::mutex> lock(sleeping);
                wake.wait(lock, [&] { return epoch.load(std::memory_order_acquire) != seen; });
            }
            ++seen;
            if (thread < wanted)
                work(context, thread);
            pending.fetch_sub(1, std::memory_order_acq_rel);
        }
    }

    const pid_t process = getpid();
    std::mutex running, sleeping;
    std::condition_variable wake;
    std::atomic<uint64_t> epoch{0};
    std::atomic<int> pending{0};
    int started = 0, wanted = 0;
    Work work = nullptr;
    void *context = nullptr;
};
