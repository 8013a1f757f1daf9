// A team of threads that run one function together and meet at barriers in it. The caller is member 0.
#pragma once
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace anabranch {

inline void breathe() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

class Team {
   public:
    explicit Team(int members) : members_(members) {
        for (int i = 1; i < members; ++i) threads_.emplace_back([this, i] { serve(i); });
    }
    ~Team() {
        {
            std::lock_guard<std::mutex> hold(mutex_);
            closing_.store(true);
            turn_.fetch_add(1);
        }
        wake_.notify_all();
        for (auto& thread : threads_) thread.join();
    }
    Team(const Team&) = delete;

    int members() const { return members_; }

    // Runs work(member) on all members and returns when all have ended.
    void run(const std::function<void(int)>& work) {
        {
            std::lock_guard<std::mutex> hold(mutex_);
            work_ = &work;
            turn_.fetch_add(1);
        }
        wake_.notify_all();
        work(0);
        meet();
    }

    // Returns on every member once all have called it. Spins for the microseconds that phases differ by, then sleeps.
    void meet() {
        if (members_ == 1) {
            next_.store(0, std::memory_order_relaxed);
            return;
        }
        const uint32_t round = round_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == members_) {
            arrived_.store(0, std::memory_order_relaxed);
            next_.store(0, std::memory_order_relaxed);
            round_.store(round + 1);
            if (sleepers_.load()) {  // who is not counted yet will see the new round
                std::lock_guard<std::mutex> hold(mutex_);
                met_.notify_all();
            }
            return;
        }
        if (spin(round)) return;
        std::unique_lock<std::mutex> hold(mutex_);
        sleepers_.fetch_add(1);
        met_.wait(hold, [&] { return round_.load() != round; });
        sleepers_.fetch_sub(1);
    }

    // The first of the next `run` tasks that nobody has taken since the last meeting, which may be past the last one.
    int take(int run = 1) { return next_.fetch_add(run, std::memory_order_relaxed); }

    // work(from, to) for tasks that nobody else takes, in runs of neighbours: their weights lie one after the other in
    // memory, and each beginning costs a wait.
    template <class Work>
    void share(int tasks, const Work& work) {
        const int run = std::clamp(tasks / (4 * members_), 1, 8);
        for (int from; (from = take(run)) < tasks;) work(from, std::min(from + run, tasks));
    }

   private:
    static constexpr int SPINS = 20000, FEW = 20;

    // Whether all met meanwhile. Where others take a core, two members share one, and who spins keeps the other from what
    // it waits for: after each time in vain a thread spins less, and more again once it was worth it.
    bool spin(uint32_t round) const {
        static thread_local int patience = SPINS;
        for (int spun = 0; spun < patience; ++spun) {
            if (round_.load(std::memory_order_acquire) != round) {
                patience = std::min(2 * patience, SPINS);
                return true;
            }
            breathe();
        }
        patience = std::max(patience / 4, FEW);
        return false;
    }

    void serve(int member) {
        uint32_t seen = 0;
        while (true) {
            // Always as long: a core that has halted between two steps wakes slowly.
            for (int spun = 0; turn_.load(std::memory_order_acquire) == seen && spun < SPINS; ++spun) breathe();
            if (turn_.load(std::memory_order_acquire) == seen) {
                std::unique_lock<std::mutex> hold(mutex_);
                wake_.wait(hold, [&] { return turn_.load() != seen; });
            }
            seen = turn_.load(std::memory_order_acquire);
            if (closing_.load()) return;
            (*work_)(member);
            meet();
        }
    }

    const int members_;
    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable wake_, met_;
    const std::function<void(int)>* work_ = nullptr;
    std::atomic<bool> closing_{false};
    std::atomic<uint32_t> turn_{0}, round_{0};
    std::atomic<int> arrived_{0}, next_{0}, sleepers_{0};
};

}  // namespace anabranch
