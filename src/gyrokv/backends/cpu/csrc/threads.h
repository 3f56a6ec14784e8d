// Runs one function on several threads at once, without starting threads per call: on torch's own OpenMP team where
// Python found one (a second set of threads would fight its spinning workers for the cores), else on a pool.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

#ifndef _WIN32
#include <pthread.h>
#endif

namespace gyrokv {

using Work = void (*)(void*);  // must not throw
using Team = void (*)(Work, void*, unsigned threads, unsigned flags);  // GOMP_parallel

inline void pause_thread() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Detached threads that live as long as the process. One caller at a time; the caller works too.
class Pool {
public:
    // Runs `work` on at most `threads` threads. False, with nothing done, when another caller has the pool.
    bool run(int threads, Work work, void* data) {
        std::unique_lock<std::mutex> caller(caller_, std::try_to_lock);
        if (!caller) return false;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            grow(threads - 1);
            work_ = work;
            data_ = data;
            vacancies_ = threads - 1;
            generation_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        work(data);
        std::unique_lock<std::mutex> lock(mutex_);
        vacancies_ = 0;  // who wakes up now is late: nothing is left to do
        idle_.wait(lock, [this] { return busy_ == 0; });
        return true;
    }

private:
    static constexpr int kSpins = 1000;  // some 40 us: the next layer's call finds its threads awake

    void grow(int size) {
        try {
            for (; size_ < size; ++size_) std::thread(&Pool::serve, this).detach();
        } catch (const std::system_error&) {
            // no more threads to be had: fewer share the work
        }
    }

    void serve() {
        uint64_t seen = 0;
        for (;;) {
            for (int i = 0; i < kSpins && generation_.load(std::memory_order_acquire) == seen; ++i) pause_thread();
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
            seen = generation_.load(std::memory_order_relaxed);
            if (vacancies_ == 0) continue;
            --vacancies_;
            ++busy_;
            const Work work = work_;
            void* const data = data_;
            lock.unlock();
            work(data);
            lock.lock();
            if (--busy_ == 0) idle_.notify_one();
        }
    }

    std::mutex caller_, mutex_;
    std::condition_variable wake_, idle_;
    std::atomic<uint64_t> generation_{0};
    int size_ = 0, vacancies_ = 0, busy_ = 0;
    Work work_ = nullptr;
    void* data_ = nullptr;
};

class Threads {
public:
    // `team`: GOMP_parallel, or null for the pool.
    void use(Team team) {
#ifndef _WIN32
        static const int registered = pthread_atfork(nullptr, nullptr, &Threads::forked);
        (void)registered;
#endif
        team_.store(team);
    }

    void run(int threads, Work work, void* data) {
        if (threads <= 1) return work(data);
        if (Team team = team_.load(std::memory_order_relaxed)) return team(work, data, unsigned(threads), 0);
        Pool* pool = pool_.load(std::memory_order_acquire);
        if (pool == nullptr) {
            Pool* fresh = new Pool;  // never deleted: its threads wait on it until the process ends
            if (pool_.compare_exchange_strong(pool, fresh)) {
                pool = fresh;
            } else {
                delete fresh;
            }
        }
        if (!pool->run(threads, work, data)) work(data);
    }

private:
    // A child has none of its parent's threads, neither the pool's nor the team's, and both would wait for them.
    static void forked();

    std::atomic<Team> team_{nullptr};
    std::atomic<Pool*> pool_{nullptr};
};

inline Threads threads;

inline void Threads::forked() {
    threads.team_.store(nullptr);
    threads.pool_.store(nullptr);
}

}  // namespace gyrokv
