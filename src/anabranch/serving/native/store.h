// Experts that are not all in memory: records of a file, read into the slots of an arena by threads of their own.
//
// A slot is in use while its expert's round is computed, and expected from when a later layer's choice is guessed until
// it is known; only others are given away, the least wanted first, as Python forecasts it. What a layer needs is read
// before what a later one is expected to need.
#pragma once
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "model.h"
#include "vector.h"

namespace anabranch {

// FNV-1a on sixteen lanes, folded into 64 bits. bytes: a multiple of 64.
inline uint64_t checksum(const uint8_t* data, int64_t bytes) {
    u32x16 lanes = u32x16{} + 2166136261u;
    for (int64_t i = 0; i < bytes; i += sizeof lanes) {
        u32x16 words;
        std::memcpy(&words, data + i, sizeof words);
        lanes = (lanes ^ words) * 16777619u;
    }
    uint64_t hash = 14695981039346656037u;
    for (int i = 0; i < LANES; ++i) hash = (hash ^ lanes[i]) * 1099511628211u;
    return hash;
}

class Store {
   public:
    explicit Store(const AnabranchStore& given)
        : given_(given),
          slot_(given.records, NONE),
          slots_(given.slots),
          state_(std::make_unique<std::atomic<int>[]>(given.slots)) {
        for (int s = 0; s < given.slots; ++s) state_[s] = EMPTY;
        for (int i = 0; i < READERS; ++i) readers_.emplace_back([this] { serve(); });
    }
    ~Store() {
        {
            std::lock_guard<std::mutex> hold(mutex_);
            closing_ = true;
        }
        work_.notify_all();
        for (auto& reader : readers_) reader.join();
    }
    Store(const Store&) = delete;

    int slots() const { return given_.slots; }

    // Takes up to slots() records into use and has the missing ones read. Returns them, the resident ones first.
    std::vector<int> need(const std::vector<int>& records) {
        std::unique_lock<std::mutex> hold(mutex_);
        std::vector<int> order, coming, missing;
        for (auto& slot : slots_) slot.expected = false;
        for (const int record : records) {
            given_.needed[record] = 1;
            const int s = slot_[record];
            if (s == NONE) {
                missing.push_back(record);
                continue;
            }
            slots_[s].in_use = true;
            if (state_[s] == READY) {
                order.push_back(record), ++count(HITS);
            } else {
                coming.push_back(record), ++count(state_[s] == FAILED ? MISSES : LATE);
                if (state_[s] == FAILED) queue(s, wanted_now_);
            }
        }
        // What is still only expected comes too late, unless it is needed now.
        for (const int s : ahead_) slots_[s].in_use ? wanted_now_.push_back(s) : drop(s);
        ahead_.clear();
        for (const int record : missing) {
            int s;
            while ((s = least_wanted()) == NONE) wait_for_read(hold);
            give(s, record);
            slots_[s].in_use = true;
            queue(s, wanted_now_);
            ++count(MISSES);
        }
        order.insert(order.end(), coming.begin(), coming.end());
        order.insert(order.end(), missing.begin(), missing.end());
        in_use_ = order;
        return order;
    }

    // Reads ahead what a later layer will probably need, the most probable first, in the place of what is less wanted in
    // the long run: a guess that drove out better experts would cost more reads than it hides.
    void expect(const std::vector<int>& records) {
        std::lock_guard<std::mutex> hold(mutex_);
        for (const int record : records)
            if (slot_[record] != NONE) slots_[slot_[record]].expected = true;
        for (const int record : records) {
            if (ahead_.size() == AHEAD) break;
            if (slot_[record] != NONE) continue;
            const int s = least_wanted();
            if (s == NONE) break;
            if (wanted(s) > given_.wanted[record]) continue;
            give(s, record);
            slots_[s].expected = true;
            queue(s, ahead_);
        }
    }

    // The weights of a record in use, once they are read.
    const uint8_t* wait(int record) {
        const int s = slot_[record];
        if (state_[s].load(std::memory_order_acquire) < READY) {
            std::unique_lock<std::mutex> hold(mutex_);
            while (state_[s].load() < READY) wait_for_read(hold);
        }
        if (state_[s].load(std::memory_order_relaxed) == FAILED) failed_.store(record);
        return data(s);
    }

    void release() {
        std::lock_guard<std::mutex> hold(mutex_);
        for (const int record : in_use_) slots_[slot_[record]].in_use = false;
        in_use_.clear();
    }

    // A record that was used though it could not be read or is not what was written, and forgets it; else NONE.
    int failed() { return failed_.exchange(NONE); }

    static constexpr int NONE = -1;

   private:
    static constexpr int READERS = 4;     // reads in flight: a disk is not at its best with one
    static constexpr size_t AHEAD = 8;    // more would not be read in the time of a layer
    enum State { EMPTY, QUEUED, READING, READY, FAILED };
    enum Figure { HITS, LATE, MISSES, READS, WAIT_NS };
    struct Slot {
        int record = NONE;
        bool in_use = false, expected = false;
    };

    int64_t& count(Figure which) { return given_.figures[which]; }
    uint8_t* data(int s) const { return given_.arena + s * given_.record_bytes; }

    float wanted(int s) const { return slots_[s].record == NONE ? -1.0f : given_.wanted[slots_[s].record]; }

    // The slot to give away: none that is in use, expected or being read.
    int least_wanted() const {
        int best = NONE;
        float least = INFINITY;
        for (int s = 0; s < given_.slots; ++s) {
            const auto& slot = slots_[s];
            const int state = state_[s];
            if (slot.in_use || slot.expected || state == QUEUED || state == READING) continue;
            if (wanted(s) < least) least = wanted(s), best = s;
        }
        return best;
    }

    // Waits for any read to end; counts the time in which at least one thread waits.
    void wait_for_read(std::unique_lock<std::mutex>& hold) {
        if (waiting_++ == 0) since_ = std::chrono::steady_clock::now();
        done_.wait(hold);
        if (--waiting_ == 0)
            count(WAIT_NS) += std::chrono::nanoseconds(std::chrono::steady_clock::now() - since_).count();
    }

    void drop(int s) {
        slot_[slots_[s].record] = NONE;
        slots_[s].record = NONE;
        state_[s] = EMPTY;
    }

    void give(int s, int record) {
        if (slots_[s].record != NONE) drop(s);
        slots_[s].record = record;
        slot_[record] = s;
    }

    void queue(int s, std::deque<int>& line) {
        state_[s] = QUEUED;
        line.push_back(s);
        work_.notify_one();
    }

    void serve() {
        std::unique_lock<std::mutex> hold(mutex_);
        while (true) {
            work_.wait(hold, [this] { return closing_ || !wanted_now_.empty() || !ahead_.empty(); });
            if (closing_) return;
            auto& line = wanted_now_.empty() ? ahead_ : wanted_now_;
            const int s = line.front();
            line.pop_front();
            state_[s] = READING;
            const int record = slots_[s].record;
            hold.unlock();
            const bool good = read(record, data(s));
            hold.lock();
            ++count(READS);
            state_[s].store(good ? READY : FAILED, std::memory_order_release);
            done_.notify_all();
        }
    }

    bool read(int record, uint8_t* to) const {
        const int64_t bytes = given_.record_bytes, at = given_.first_byte + record * bytes;
        for (int64_t done = 0; done < bytes;) {
            const ssize_t got = pread(given_.file, to + done, bytes - done, at + done);
            if (got <= 0) return false;
            done += got;
        }
        posix_fadvise(given_.file, at, bytes, POSIX_FADV_DONTNEED);
        return checksum(to, bytes) == given_.checksums[record];
    }

    const AnabranchStore given_;
    std::vector<int> slot_;  // of a record, or NONE
    std::vector<Slot> slots_;
    std::unique_ptr<std::atomic<int>[]> state_;  // of a slot
    std::vector<int> in_use_;
    std::deque<int> wanted_now_, ahead_;  // slots to read
    std::mutex mutex_;
    std::condition_variable work_, done_;
    std::atomic<int> failed_{NONE};
    int waiting_ = 0;
    std::chrono::steady_clock::time_point since_;
    bool closing_ = false;
    std::vector<std::thread> readers_;
};

}  // namespace anabranch
