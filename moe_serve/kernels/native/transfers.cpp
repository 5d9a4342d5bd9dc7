// Threads that bring expert records into slots: what is needed now first, guesses after it, in
// pieces. From a file each piece is read and checked by whichever thread comes first, so that one
// record has the whole disk; from host memory it is copied, no faster than a link would carry it.
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <ctime>
#include <mutex>
#include <new>

#include <fcntl.h>
#include <pthread.h>
#if defined(__linux__)
#include <sys/prctl.h>
#endif
#include <unistd.h>

#include "standard.h"

#include "crc32.h"
#include "transfers.h"

namespace ms {
namespace {

constexpr int64_t kAlignment = 4096;   // of records in a file, and of reads past the page cache
constexpr int64_t kRecordHeader = 64;
constexpr int64_t kExpertField = 36, kCrcField = 48, kCompared = 52;  // of experts/records.py
constexpr size_t kStackBytes = 256 << 10;

enum Outcome : int64_t { kGivenUp = 0, kWhole = 1, kFailed = 2 };
enum State : uint8_t { kNone, kUnderWay, kEnded };

double now_s() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

// Sleep until a time of `now_s`.
void sleep_until(double due_s) {
    while (true) {
        const double left_s = due_s - now_s();
        if (left_s <= 0) return;
        timespec left = {time_t(left_s), long((left_s - double(time_t(left_s))) * 1e9)};
        nanosleep(&left, nullptr);
    }
}

}  // namespace

// Where records come from. descriptor: an open file, or -1: host memory of num_layers * num_experts
// records, record_bytes[0] apart. first_bytes, record_bytes, headers (64 bytes, of expert 0 and
// without crc): by layer.
struct TransferSource {
    int32_t descriptor;
    int32_t num_threads;
    const char* host;
    double bytes_per_s;  // of the link in front of host memory
    int64_t num_layers, num_experts;
    const int64_t *first_bytes, *record_bytes;
    const char* headers;
    char* slots;
    int64_t slot_bytes, num_slots;
    int64_t piece_bytes;         // a multiple of 4,096
    int64_t urgent_piece_bytes;  // of what is needed now
};

// A record on its way, at most one for a slot. asked_s: when it was asked for; taken: bytes handed
// out to threads, in order; at: bytes that have arrived; num_running: threads that bring in a piece.
struct Transfer {
    double asked_s;
    int32_t layer, expert;
    int64_t taken, at;
    int32_t num_running;
    State state;
    bool is_urgent, is_given_up, has_failed;
};

class Transfers {
  public:
    explicit Transfers(const TransferSource& source)
        : source_(source),
          transfers_(source.num_slots),
          slot_of_expert_(source.num_layers * source.num_experts, -1),
          first_bytes_(source.first_bytes, source.first_bytes + source.num_layers),
          record_bytes_(source.record_bytes, source.record_bytes + source.num_layers) {
        for (auto* queue : {&urgent_, &guesses_, &ended_}) queue->reserve(source.num_slots);
        if (source.descriptor >= 0) {
            headers_.assign(source.headers, source.headers + source.num_layers * kRecordHeader);
            pieces_ = ceil_div(*std::max_element(record_bytes_.begin(), record_bytes_.end()),
                               source.piece_bytes);
            crcs_.resize(source.num_slots * pieces_);
            shift_ = crc32_shift(source.piece_bytes);
            for (int64_t size : record_bytes_)
                last_shifts_.push_back(crc32_shift((size - 1) % source.piece_bytes + 1));
        }
    }

    // Returns whether all threads run.
    bool start() {
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        pthread_attr_setstacksize(&attributes, kStackBytes);
        bool has_started = true;
        for (int32_t index = 0; index < source_.num_threads && has_started; index++) {
            pthread_t thread;
            has_started = pthread_create(&thread, &attributes, run, this) == 0;
            if (has_started) threads_.push_back(thread);
        }
        pthread_attr_destroy(&attributes);
        return has_started;
    }

    // loads: [count] of (expert, slot).
    void begin(int64_t layer, int64_t count, const int64_t (*loads)[2], bool is_urgent) {
        int64_t num_pieces = 0;
        const double asked_s = now_s();
        {
            std::lock_guard<std::mutex> lock(mutex_);
            for (int64_t index = 0; index < count; index++) {
                const int32_t expert = int32_t(loads[index][0]), slot = int32_t(loads[index][1]);
                Transfer& transfer = transfers_[slot];
                transfer = {asked_s, int32_t(layer), expert, 0,     0, 0, kUnderWay,
                            is_urgent, false,        false};
                slot_of_expert_[layer * source_.num_experts + expert] = slot;
                (is_urgent ? urgent_ : guesses_).push_back(slot);
                num_pieces += ceil_div(size_of(transfer), piece_of(transfer));
            }
            num_under_way_ += count;
            if (!is_urgent) num_guesses_ += count;
            if (is_closing_) give_up_all();  // nobody would bring them
        }
        wake(num_pieces);
    }

    // A guess is needed now; one that was given up goes on.
    void hurry(int64_t layer, int64_t expert) {
        std::lock_guard<std::mutex> lock(mutex_);
        const int32_t slot = slot_of_expert_[layer * source_.num_experts + expert];
        if (slot < 0) return;
        Transfer& transfer = transfers_[slot];
        if (transfer.state == kEnded) {
            if (transfer.has_failed || is_whole(transfer)) return;
            if (is_closing_) return;
            transfer.state = kUnderWay;
            transfer.asked_s = now_s();
            ended_.erase(std::find(ended_.begin(), ended_.end(), slot));
            num_under_way_++;
        } else if (!transfer.is_urgent) {
            num_guesses_--;
            forget(guesses_, slot);
        } else {
            return;
        }
        transfer.is_urgent = true;
        transfer.is_given_up = false;
        if (transfer.taken < size_of(transfer) && !transfer.has_failed) {
            urgent_.push_back(slot);
            wake(ceil_div(size_of(transfer) - transfer.taken, piece_of(transfer)));
        }
    }

    // Stop a guess. Returns whether there was one.
    bool give_up(int64_t layer, int64_t expert) {
        std::lock_guard<std::mutex> lock(mutex_);
        const int32_t slot = slot_of_expert_[layer * source_.num_experts + expert];
        if (slot < 0) return false;
        Transfer& transfer = transfers_[slot];
        if (transfer.state != kUnderWay || transfer.is_urgent || transfer.is_given_up) return false;
        transfer.is_given_up = true;
        forget(guesses_, slot);
        if (!transfer.num_running) end(transfer, slot);
        return true;
    }

    // Take up to `most` transfers that have ended: layer, expert, slot, bytes that arrived,
    // Outcome, whether it was urgent. wait: until there is one, where any is under way.
    int64_t ended(bool wait, int64_t most, int64_t (*out)[6]) {
        std::unique_lock<std::mutex> lock(mutex_);
        while (wait && ended_.empty() && num_under_way_) change_.wait(lock);
        int64_t count = 0;
        while (count < most && !ended_.empty()) {
            const int32_t slot = ended_.front();
            ended_.erase(ended_.begin());
            Transfer& transfer = transfers_[slot];
            const Outcome outcome =
                transfer.has_failed ? kFailed : is_whole(transfer) ? kWhole : kGivenUp;
            const int64_t fields[6] = {transfer.layer, transfer.expert, slot, transfer.at, outcome,
                                       transfer.is_urgent};
            std::copy(fields, fields + 6, out[count++]);
            transfer.state = kNone;
            slot_of_expert_[transfer.layer * source_.num_experts + transfer.expert] = -1;
        }
        return count;
    }

    bool is_known(int64_t layer, int64_t expert) {
        std::lock_guard<std::mutex> lock(mutex_);
        return slot_of_expert_[layer * source_.num_experts + expert] >= 0;
    }

    void count(int64_t* under_way, int64_t* guesses) {
        std::lock_guard<std::mutex> lock(mutex_);
        *under_way = num_under_way_;
        *guesses = num_guesses_;
    }

    int64_t await(Arrivals& arrivals, const ExpertTable& experts, uint8_t* ready) {
        std::unique_lock<std::mutex> lock(mutex_);
        double since_s = 0;
        while (true) {
            int64_t num_ready = 0, num_left = 0;
            bool has_failed = false;
            for (int64_t index = 0; index < arrivals.count; index++) {
                if (arrivals.was_run[index]) continue;
                num_left++;
                const int64_t expert = arrivals.expert_ids[index];
                const int32_t slot =
                    slot_of_expert_[arrivals.layer * source_.num_experts + expert];
                if (slot < 0) {
                    has_failed = true;
                } else if (transfers_[slot].state != kEnded) {
                    continue;  // also one that has failed while other pieces of it are read
                } else if (!is_whole(transfers_[slot])) {
                    has_failed = true;
                } else {
                    if (!num_ready) memset(ready, 0, experts.num_experts);
                    ready[expert] = 1;
                    arrivals.was_run[index] = 1;
                    const_cast<int32_t*>(experts.slot_of_expert)[expert] = slot;
                    num_ready++;
                }
            }
            if (num_ready || !num_left || has_failed) {
                if (since_s > 0) arrivals.stall_s += now_s() - since_s;
                return num_ready ? num_ready : num_left ? -1 : 0;
            }
            if (since_s == 0) since_s = now_s();
            change_.wait(lock);
        }
    }

    // Give up what waits, and wait for what runs.
    void close() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            if (is_closing_) return;
            is_closing_ = true;
            give_up_all();
            work_.notify_all();
        }
        for (pthread_t thread : threads_) pthread_join(thread, nullptr);
        threads_.clear();
    }

  private:
    static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

    int64_t size_of(const Transfer& transfer) const { return record_bytes_[transfer.layer]; }
    bool is_whole(const Transfer& transfer) const {
        return !transfer.has_failed && transfer.at == size_of(transfer);
    }

    static void forget(std::vector<int32_t>& queue, int32_t slot) {
        const auto place = std::find(queue.begin(), queue.end(), slot);
        if (place != queue.end()) queue.erase(place);
    }

    // End what waits; what runs ends by itself. The mutex is held.
    void give_up_all() {
        for (auto* queue : {&urgent_, &guesses_}) {
            for (int32_t slot : *queue)
                if (!transfers_[slot].num_running) end(transfers_[slot], slot);
            queue->clear();
        }
    }

    void wake(int64_t num_pieces) {
        if (num_pieces >= source_.num_threads)
            work_.notify_all();
        else
            for (; num_pieces > 0; num_pieces--) work_.notify_one();
    }

    int64_t piece_of(const Transfer& transfer) const {
        return transfer.is_urgent ? source_.urgent_piece_bytes : source_.piece_bytes;
    }

    // Hand a transfer back; the mutex is held.
    void end(Transfer& transfer, int32_t slot) {
        transfer.state = kEnded;
        num_under_way_--;
        num_guesses_ -= !transfer.is_urgent;
        ended_.push_back(slot);
        change_.notify_all();
    }

    static void* run(void* self) {
#if defined(__linux__)
        prctl(PR_SET_NAME, "expert-transfer", 0, 0, 0);
        prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0);  // nanoseconds; links of microseconds sleep here
#endif
        static_cast<Transfers*>(self)->work();
        return nullptr;
    }

    void work() {
        std::unique_lock<std::mutex> lock(mutex_);
        while (true) {
            while (urgent_.empty() && guesses_.empty() && !is_closing_) work_.wait(lock);
            if (is_closing_) return;
            auto& queue = urgent_.empty() ? guesses_ : urgent_;
            const int32_t slot = queue.front();
            Transfer& transfer = transfers_[slot];
            const int64_t size = size_of(transfer), begin = transfer.taken;
            const int64_t end_byte = std::min(size, begin + piece_of(transfer));
            transfer.taken = end_byte;
            if (end_byte == size) queue.erase(queue.begin());
            transfer.num_running++;
            lock.unlock();
            const bool is_good = bring(transfer, slot, begin, end_byte);
            lock.lock();
            transfer.num_running--;
            if (is_good) {
                transfer.at += end_byte - begin;
            } else if (!transfer.has_failed) {
                transfer.has_failed = true;
                forget(transfer.is_urgent ? urgent_ : guesses_, slot);
            }
            if (transfer.num_running) continue;
            if (transfer.at == size && !is_right(transfer, slot)) transfer.has_failed = true;
            if (transfer.has_failed || transfer.at == size || transfer.is_given_up || is_closing_)
                end(transfer, slot);
        }
    }

    // What of `transfer` is read here does not change while it is under way.
    bool bring(const Transfer& transfer, int64_t slot, int64_t begin, int64_t end_byte) {
        const int64_t layer = transfer.layer, expert = transfer.expert;
        char* into = source_.slots + slot * source_.slot_bytes + begin;
        if (source_.descriptor < 0) {
            carry(transfer, into, begin, end_byte - begin);
            return true;
        }
        int64_t at = first_bytes_[layer] + expert * record_bytes_[layer] + begin;
        for (int64_t left = end_byte - begin; left > 0;) {
            ssize_t count = pread(source_.descriptor, into, left, at);
            if (count < 0 && errno == EINTR) continue;
            if (count < left) count -= count % kAlignment;  // the next one must begin at a block
            if (count <= 0) return false;
            into += count;
            at += count;
            left -= count;
        }
        const char* piece = source_.slots + slot * source_.slot_bytes + begin;
        const int64_t skipped = begin ? 0 : kRecordHeader;
        crcs_[slot * pieces_ + begin / source_.piece_bytes] =
            crc32((const uint8_t*)piece + skipped, end_byte - begin - skipped);
        return true;
    }

    // Copy, and stay until the link has carried it, after all that was asked of it before: a link
    // goes from one to the next by itself, and does not wait until a thread has woken.
    void carry(const Transfer& transfer, char* into, int64_t begin, int64_t size) {
        double due_s;
        {
            std::lock_guard<std::mutex> lock(link_mutex_);
            free_at_s_ =
                std::max(transfer.asked_s, free_at_s_) + double(size) / source_.bytes_per_s;
            due_s = free_at_s_;
        }
        const int64_t record = transfer.layer * source_.num_experts + transfer.expert;
        memcpy(into, source_.host + record * record_bytes_[0] + begin, size);
        sleep_until(due_s);
    }

    // Whether a record that has arrived is the one that was wanted, and whole.
    bool is_right(const Transfer& transfer, int64_t slot) const {
        if (source_.descriptor < 0) return true;  // it was checked when memory was filled
        const char* found = source_.slots + slot * source_.slot_bytes;
        char wanted[kRecordHeader];
        memcpy(wanted, &headers_[transfer.layer * kRecordHeader], kRecordHeader);
        memcpy(wanted + kExpertField, &transfer.expert, 4);
        memcpy(wanted + kCrcField, found + kCrcField, 4);
        if (memcmp(wanted, found, kCompared)) return false;
        const int64_t count = ceil_div(size_of(transfer), source_.piece_bytes);
        const uint32_t* crcs = &crcs_[slot * pieces_];
        uint32_t crc = crcs[0];
        for (int64_t piece = 1; piece < count; piece++) {
            const uint32_t shift =
                piece + 1 == count ? last_shifts_[transfer.layer] : shift_;
            crc = crc32_joined(crc, crcs[piece], shift);
        }
        return !memcmp(&crc, found + kCrcField, 4);
    }

    const TransferSource source_;
    std::mutex mutex_;
    std::condition_variable work_, change_;
    // slots; each has room for all of them, so that no thread ever asks for memory
    std::vector<int32_t> urgent_, guesses_, ended_;
    std::vector<Transfer> transfers_;  // by slot
    std::vector<int32_t> slot_of_expert_;
    std::vector<int64_t> first_bytes_, record_bytes_;
    std::vector<char> headers_;
    std::vector<uint32_t> crcs_, last_shifts_;  // of each slot's pieces; of each layer's last piece
    std::vector<pthread_t> threads_;
    int64_t pieces_ = 0, num_under_way_ = 0, num_guesses_ = 0;
    uint32_t shift_ = 0;
    bool is_closing_ = false;
    std::mutex link_mutex_;
    double free_at_s_ = 0;
};

int64_t await_arrivals(Arrivals& arrivals, const ExpertTable& experts, uint8_t* ready) {
    return static_cast<Transfers*>(arrivals.transfers)->await(arrivals, experts, ready);
}

}  // namespace ms

MS_VISIBLE int64_t ms_transfer_source_bytes(void) {
    return sizeof(ms::TransferSource);
}

// Returns null where there is no memory, or no thread.
MS_VISIBLE void* ms_transfers_open(const ms::TransferSource* source) {
    ms::Transfers* transfers = nullptr;
    try {
        transfers = new ms::Transfers(*source);
        if (transfers->start()) return transfers;
        transfers->close();
    } catch (const std::bad_alloc&) {
    }
    delete transfers;
    return nullptr;
}

// Wait for what runs; what has ended can still be asked for.
MS_VISIBLE void ms_transfers_close(void* transfers) {
    static_cast<ms::Transfers*>(transfers)->close();
}

MS_VISIBLE void ms_transfers_free(void* transfers) {
    static_cast<ms::Transfers*>(transfers)->close();
    delete static_cast<ms::Transfers*>(transfers);
}

// loads: [count, 2], expert and slot.
MS_VISIBLE void ms_transfers_begin(
    void* transfers, int64_t layer, int64_t count, const void* loads, int32_t is_urgent) {
    static_cast<ms::Transfers*>(transfers)->begin(
        layer, count, (const int64_t(*)[2])loads, is_urgent);
}

MS_VISIBLE void ms_transfers_hurry(void* transfers, int64_t layer, int64_t expert) {
    static_cast<ms::Transfers*>(transfers)->hurry(layer, expert);
}

MS_VISIBLE int32_t ms_transfers_give_up(void* transfers, int64_t layer, int64_t expert) {
    return static_cast<ms::Transfers*>(transfers)->give_up(layer, expert);
}

// out: [most, 6]; see Transfers::ended.
MS_VISIBLE int64_t ms_transfers_ended(void* transfers, int32_t wait, int64_t most, void* out) {
    return static_cast<ms::Transfers*>(transfers)->ended(wait, most, (int64_t(*)[6])out);
}

MS_VISIBLE int32_t ms_transfers_is_known(void* transfers, int64_t layer, int64_t expert) {
    return static_cast<ms::Transfers*>(transfers)->is_known(layer, expert);
}

// counts: transfers that wait or run, and guesses among them.
MS_VISIBLE void ms_transfers_count(void* transfers, int64_t* counts) {
    static_cast<ms::Transfers*>(transfers)->count(counts, counts + 1);
}
