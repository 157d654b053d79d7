// Asynchronous file I/O: a queue of requests, cut into pieces that worker threads keep in flight.
//
// Called through ctypes by deepspeed/tiers/native_queue.py. Plain system calls: neither liburing nor libaio is needed, at
// build time or at run time.
//
//     start() -> requests -> take(): pieces -> worker: io_uring | io_submit | pread/pwrite -> wait()
//
// A request moves bytes between memory and one file, or several in stripes, in the direction it says. It is cut as
// deepspeed/tiers/pieces.py describes: whole pages go to the direct descriptor, the bytes before the first and after the
// last page boundary to the buffered one. Memory that is not page-aligned goes through a buffer that is. Checksums are made
// and compared here, where the bytes are hot and another core waits.
//
// Invariant: a request is done when none of its pieces can touch its memory any more, failed or not. The first failure is
// kept; pieces not begun by then are dropped.
//
// The means were chosen by measurement (benchmarks/file_io.py): all are equally fast within the disk's own swing; threads
// cost 1.4 times the CPU time.
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "native.h"

#if defined(__linux__) && defined(__has_include)
#if __has_include(<linux/io_uring.h>) && __has_include(<linux/aio_abi.h>)
#define DS_LINUX_AIO 1
#include <linux/aio_abi.h>
#include <linux/io_uring.h>
#include <sys/syscall.h>
#endif
#endif

namespace {

constexpr int64_t kPage = 4096;
constexpr size_t kHugePage = 2 << 20;
constexpr int64_t kChecked = 65536;  // bytes under one checksum
constexpr int64_t kAhead = 2048;     // 6.5 to 10.3 GB/s from memory on a Sapphire Rapids core; 31 from cache
constexpr int kMaxThreads = 32;
constexpr int kMaxBounces = 8;  // per worker: memory, not speed, limits those
constexpr int kBatch = 4;       // pieces a worker takes at a time, so that several share a request

enum Means { kAuto, kIoUring, kLibaio, kThreads };
enum Fault { kNoFault, kEio, kEnospc, kShort, kEnd, kFlip, kRefuse };
enum Kind { kFine, kOs, kShortfall, kCorrupt };

struct Failure {
    int32_t kind, error, file, unused;
    int64_t offset;  // in that file
    uint64_t expected, got;
};

// Eight independent chains of xor, rotate, multiply, so that the multiplier is never waited for: about 8 bytes a cycle. Each
// step is one-to-one in the word and in the chain, so a change of one word always changes the result. The offset in the
// logical space goes in: bytes of another place do not pass.
uint64_t checksum(const char* data, int64_t offset) {
    constexpr uint64_t kOdd = 0x9E3779B97F4A7C15ull;
    uint64_t lanes[8];
    for (int i = 0; i < 8; ++i) lanes[i] = (static_cast<uint64_t>(offset) + 1) * kOdd + i;
    for (int64_t at = 0; at < kChecked; at += 64) {
        __builtin_prefetch(data + at + kAhead);
        uint64_t words[8];
        std::memcpy(words, data + at, 64);
        for (int i = 0; i < 8; ++i) {
            uint64_t x = lanes[i] ^ words[i];
            lanes[i] = (x << 29 | x >> 35) * kOdd;
        }
    }
    uint64_t sum = 0;
    for (uint64_t lane : lanes) {
        sum = (sum ^ lane ^ lane >> 32) * kOdd;
        sum ^= sum >> 29;
    }
    return sum < 2 ? sum + 2 : sum;  // 0 and 1 say that there is no checksum
}

struct Request {
    std::vector<int> direct, buffered;
    int64_t stripe, offset, nbytes;
    char* memory;
    bool is_write;
    uint64_t* checksums;
    int64_t next = 0;      // first byte not yet cut
    int64_t num_open = 0;  // pieces cut and not finished
    bool is_done = false;
    Failure failure{};
};

struct Piece {
    Request* request = nullptr;
    int file = 0;
    int64_t file_offset = 0, start = 0, nbytes = 0;
    bool is_whole_pages = false;
    Fault fault = kNoFault;
    char* bounce = nullptr;
    iovec vector{};
};

Piece cut(Request& r, int64_t block) {
    Piece p;
    p.request = &r;
    int64_t at = r.offset + r.next, end = r.offset + r.nbytes;
    int64_t unit = at % kPage ? kPage : block;
    int64_t stop = std::min(end, (at / unit + 1) * unit);
    p.file_offset = at;
    if (r.buffered.size() > 1) {
        int64_t stripe = at / r.stripe, files = static_cast<int64_t>(r.buffered.size());
        p.file = static_cast<int>(stripe % files);
        p.file_offset = stripe / files * r.stripe + at % r.stripe;
        stop = std::min(stop, (stripe + 1) * r.stripe);
    }
    p.is_whole_pages = at % kPage == 0 && stop - at >= kPage;
    if (p.is_whole_pages) stop -= stop % kPage;
    p.start = r.next;
    p.nbytes = stop - at;
    r.next += p.nbytes;
    return p;
}

// ------------------------------------------------------------------------------------------ how the kernel is asked

struct Completion {
    int slot;
    int64_t result;  // bytes, or -errno
};

struct Ring {
    virtual ~Ring() = default;
    virtual void push(int slot, int fd, const Piece& piece) = 0;
    virtual void submit() = 0;
    virtual int reap(Completion* found, int room, bool waits) = 0;
};

#ifdef DS_LINUX_AIO

class UringRing final : public Ring {
public:
    static std::unique_ptr<Ring> open(int depth, int* error) {
        std::unique_ptr<UringRing> ring(new UringRing);
        io_uring_params params{};
        ring->fd_ = static_cast<int>(syscall(__NR_io_uring_setup, depth, &params));
        if (ring->fd_ < 0 || !ring->map(params)) {
            *error = errno;
            return nullptr;
        }
        return ring;
    }

    ~UringRing() override {
        for (auto& [at, nbytes] : maps_) munmap(at, nbytes);
        if (fd_ >= 0) close(fd_);
    }

    void push(int slot, int fd, const Piece& piece) override {
        unsigned index = tail_ & *sq_mask_;
        io_uring_sqe& entry = entries_[index];
        std::memset(&entry, 0, sizeof entry);
        entry.opcode = piece.request->is_write ? IORING_OP_WRITEV : IORING_OP_READV;
        entry.fd = fd;
        entry.off = static_cast<uint64_t>(piece.file_offset);
        entry.addr = reinterpret_cast<uint64_t>(&piece.vector);
        entry.len = 1;
        entry.user_data = static_cast<uint64_t>(slot);
        sq_array_[index] = index;
        ++tail_;
        ++num_pushed_;
        __atomic_store_n(sq_tail_, tail_, __ATOMIC_RELEASE);
    }

    void submit() override {
        while (num_pushed_) enter(0);
    }

    int reap(Completion* found, int room, bool waits) override {
        for (;;) {
            unsigned head = *cq_head_, tail = __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE);
            int count = 0;
            for (; head != tail && count < room; ++head, ++count) {
                const io_uring_cqe& entry = done_[head & *cq_mask_];
                found[count] = {static_cast<int>(entry.user_data), entry.res};
            }
            __atomic_store_n(cq_head_, head, __ATOMIC_RELEASE);
            if (count || !waits) return count;
            enter(1);
        }
    }

private:
    bool map(const io_uring_params& p) {
        size_t sq_nbytes = p.sq_off.array + p.sq_entries * sizeof(unsigned);
        size_t cq_nbytes = p.cq_off.cqes + p.cq_entries * sizeof(io_uring_cqe);
        bool is_one = p.features & IORING_FEAT_SINGLE_MMAP;
        char* sq = part(is_one ? std::max(sq_nbytes, cq_nbytes) : sq_nbytes, IORING_OFF_SQ_RING);
        char* cq = is_one ? sq : part(cq_nbytes, IORING_OFF_CQ_RING);
        char* entries = part(p.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES);
        if (!sq || !cq || !entries) return false;
        sq_tail_ = reinterpret_cast<unsigned*>(sq + p.sq_off.tail);
        sq_mask_ = reinterpret_cast<unsigned*>(sq + p.sq_off.ring_mask);
        sq_array_ = reinterpret_cast<unsigned*>(sq + p.sq_off.array);
        cq_head_ = reinterpret_cast<unsigned*>(cq + p.cq_off.head);
        cq_tail_ = reinterpret_cast<unsigned*>(cq + p.cq_off.tail);
        cq_mask_ = reinterpret_cast<unsigned*>(cq + p.cq_off.ring_mask);
        done_ = reinterpret_cast<io_uring_cqe*>(cq + p.cq_off.cqes);
        entries_ = reinterpret_cast<io_uring_sqe*>(entries);
        tail_ = *sq_tail_;
        return true;
    }

    char* part(size_t nbytes, int64_t which) {
        void* at = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_, which);
        if (at == MAP_FAILED) return nullptr;
        maps_.emplace_back(at, nbytes);
        return static_cast<char*>(at);
    }

    // Interrupted, or short of kernel memory for the moment: the callers come again.
    void enter(unsigned min_complete) {
        int flags = min_complete ? IORING_ENTER_GETEVENTS : 0;
        auto taken = syscall(__NR_io_uring_enter, fd_, num_pushed_, min_complete, flags, nullptr, 0);
        if (taken > 0) num_pushed_ -= static_cast<unsigned>(taken);
        if (taken < 0 && (errno == EAGAIN || errno == EBUSY)) std::this_thread::sleep_for(std::chrono::microseconds(50));
    }

    int fd_ = -1;
    unsigned tail_ = 0, num_pushed_ = 0;
    unsigned *sq_tail_ = nullptr, *sq_mask_ = nullptr, *sq_array_ = nullptr;
    unsigned *cq_head_ = nullptr, *cq_tail_ = nullptr, *cq_mask_ = nullptr;
    io_uring_sqe* entries_ = nullptr;
    io_uring_cqe* done_ = nullptr;
    std::vector<std::pair<void*, size_t>> maps_;
};

class LibaioRing final : public Ring {
public:
    static std::unique_ptr<Ring> open(int depth, int* error) {
        std::unique_ptr<LibaioRing> ring(new LibaioRing(depth));
        if (syscall(__NR_io_setup, depth, &ring->context_) < 0) {
            *error = errno;
            return nullptr;
        }
        return ring;
    }

    ~LibaioRing() override {
        if (context_) syscall(__NR_io_destroy, context_);
    }

    void push(int slot, int fd, const Piece& piece) override {
        iocb& entry = entries_[static_cast<size_t>(slot)];
        std::memset(&entry, 0, sizeof entry);
        entry.aio_data = static_cast<uint64_t>(slot);
        entry.aio_lio_opcode = piece.request->is_write ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
        entry.aio_fildes = static_cast<uint32_t>(fd);
        entry.aio_buf = reinterpret_cast<uint64_t>(piece.vector.iov_base);
        entry.aio_nbytes = piece.vector.iov_len;
        entry.aio_offset = piece.file_offset;
        pushed_.push_back(&entry);
    }

    void submit() override {
        size_t begun = 0;
        while (begun < pushed_.size()) {
            auto taken = syscall(__NR_io_submit, context_, pushed_.size() - begun, pushed_.data() + begun);
            if (taken > 0) {
                begun += static_cast<size_t>(taken);
            } else if (errno == EAGAIN || errno == EINTR) {
                std::this_thread::sleep_for(std::chrono::microseconds(50));
            } else {  // about the first of them
                refused_.push_back({static_cast<int>(pushed_[begun]->aio_data), -errno});
                ++begun;
            }
        }
        pushed_.clear();
    }

    int reap(Completion* found, int room, bool waits) override {
        int count = 0;
        for (; !refused_.empty() && count < room; ++count, refused_.pop_back()) found[count] = refused_.back();
        if (count) return count;
        events_.resize(static_cast<size_t>(room));
        timespec none{};
        do {
            count = static_cast<int>(
                syscall(__NR_io_getevents, context_, waits ? 1 : 0, room, events_.data(), waits ? nullptr : &none));
        } while (count < 0 && waits);
        for (int i = 0; i < count; ++i) {
            auto& event = events_[static_cast<size_t>(i)];
            found[i] = {static_cast<int>(event.data), event.res};
        }
        return std::max(count, 0);
    }

private:
    explicit LibaioRing(int depth) : entries_(static_cast<size_t>(depth)) {}

    aio_context_t context_ = 0;
    std::vector<iocb> entries_;
    std::vector<iocb*> pushed_;
    std::vector<io_event> events_;
    std::vector<Completion> refused_;
};

#endif

std::unique_ptr<Ring> open_ring([[maybe_unused]] int means, [[maybe_unused]] int depth, int* error) {
    *error = ENOSYS;
#ifdef DS_LINUX_AIO
    if (means == kIoUring) return UringRing::open(depth, error);
    if (means == kLibaio) return LibaioRing::open(depth, error);
#endif
    return nullptr;
}

// --------------------------------------------------------------------------------------------------------- the queue

struct Options {
    int depth, threads;
    int64_t block;
    bool submits_singly, overlaps;
};

class Queue {
public:
    Queue(const Options& options, std::vector<std::unique_ptr<Ring>> rings, int num_threads) : options_(options) {
        rings.resize(static_cast<size_t>(num_threads));
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the threads of the application
        try {
            for (auto& ring : rings) {
                workers_.emplace_back([this, ring = std::move(ring)]() mutable { Worker(*this, std::move(ring)).run(); });
            }
        } catch (...) {
            pthread_sigmask(SIG_SETMASK, &before, nullptr);
            stop();
            throw;
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

    ~Queue() { stop(); }

    void start(Request* request) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!request->nbytes) {
            request->is_done = true;
            return;
        }
        if (!num_requests_++) since_ = std::chrono::steady_clock::now();
        waiting_.push_back(request);
        work_.notify_all();
    }

    bool wait(Request* request, double timeout_s) {
        std::unique_lock<std::mutex> lock(mutex_);
        auto is_done = [&] { return request->is_done; };
        return timeout_s <= 0 ? is_done() : done_.wait_for(lock, std::chrono::duration<double>(timeout_s), is_done);
    }

    double busy_s() {
        std::lock_guard<std::mutex> lock(mutex_);
        return num_requests_ ? busy_s_ + since() : busy_s_;
    }

    void inject(Fault fault, int after) {
        std::lock_guard<std::mutex> lock(mutex_);
        fault_ = fault;
        fault_after_ = after;
    }

private:
    // Keeps up to `depth` pieces in flight on its ring; without a ring, one by itself.
    class Worker {
    public:
        Worker(Queue& queue, std::unique_ptr<Ring> ring)
            : queue_(queue), ring_(std::move(ring)), depth_(ring_ ? queue.options_.depth : 1) {
            slots_.resize(static_cast<size_t>(depth_));
            found_.resize(kBatch);
            for (int i = depth_; i--;) free_.push_back(i);
        }

        ~Worker() { std::free(arena_); }

        void run() {
            bool fills = true;  // without overlap: fill the queue, then empty it, in turns
            for (;;) {
                int in_flight = depth_ - static_cast<int>(free_.size());
                if (!in_flight) fills = true;
                if (fills || queue_.options_.overlaps) {
                    Piece taken[kBatch];
                    int count = queue_.take(taken, std::min<int>(kBatch, static_cast<int>(free_.size())), !in_flight);
                    if (count < 0) return;
                    for (int i = 0; i < count; ++i) begin(taken[i]);
                    if (ring_) ring_->submit();
                    if (count && !free_.empty()) {
                        if (queue_.options_.overlaps) reap(false);
                        continue;
                    }
                }
                fills = false;
                reap(true);
            }
        }

    private:
        void reap(bool waits) {
            int in_flight = depth_ - static_cast<int>(free_.size());
            if (!ring_ || !in_flight) return;
            // A few at a time: comparing checksums takes a while, and the disk should have its next pieces meanwhile.
            int count = ring_->reap(found_.data(), std::min(in_flight, kBatch), waits);
            for (int i = 0; i < count; ++i) {
                auto [slot, result] = found_[static_cast<size_t>(i)];
                complete(slots_[static_cast<size_t>(slot)], result);
                free_.push_back(slot);
            }
        }

        void begin(Piece& taken) {
            Request& r = *taken.request;
            char* memory = r.memory + taken.start;
            if (taken.fault == kEio || taken.fault == kEnospc) {
                fail(taken, kOs, taken.fault == kEio ? EIO : ENOSPC, 0, taken.nbytes, 0);
                return queue_.finish(taken);
            }
            if (r.is_write && r.checksums) {
                for (int64_t at = 0; at < taken.nbytes; at += kChecked) {
                    r.checksums[(taken.start + at) / kChecked] = checksum(memory + at, r.offset + taken.start + at);
                }
            }
            int fd = r.direct[static_cast<size_t>(taken.file)];
            bool is_direct = taken.is_whole_pages && fd >= 0;
            if (is_direct && reinterpret_cast<uintptr_t>(memory) % kPage) {
                taken.bounce = bounce();
                is_direct = taken.bounce;
                if (taken.bounce && r.is_write) std::memcpy(taken.bounce, memory, static_cast<size_t>(taken.nbytes));
            }
            taken.vector = {taken.bounce ? taken.bounce : memory, static_cast<size_t>(taken.nbytes)};
            if (taken.fault == kShort || taken.fault == kEnd) {
                taken.vector.iov_len = std::max<size_t>(taken.vector.iov_len / 2 / kPage * kPage, 1);
            }
            if (!is_direct || taken.fault == kRefuse) return complete(taken, is_direct ? -EINVAL : 0);
            if (!ring_) {
                ssize_t result = (r.is_write ? pwritev : preadv)(fd, &taken.vector, 1, taken.file_offset);
                return complete(taken, result < 0 ? -errno : result);
            }
            int slot = free_.back();
            free_.pop_back();
            Piece& kept = slots_[static_cast<size_t>(slot)];
            kept = taken;
            ring_->push(slot, fd, kept);
            if (queue_.options_.submits_singly) ring_->submit();
        }

        // `result` bytes of the piece were moved, or -errno says why none were. What is missing goes through the page cache:
        // after a short read or write the rest need not be whole pages.
        void complete(Piece& p, int64_t result) {
            Request& r = *p.request;
            bool is_retried = result == -EINTR || result == -EAGAIN || result == -EINVAL;
            if (result < 0 && !is_retried) {
                fail(p, kOs, static_cast<int>(-result), 0, p.nbytes, 0);
            } else if (move_rest(p, std::max<int64_t>(result, 0))) {
                char* memory = r.memory + p.start;
                if (!r.is_write) {
                    if (p.bounce) std::memcpy(memory, p.bounce, static_cast<size_t>(p.nbytes));
                    if (p.fault == kFlip) memory[0] ^= 1;
                    if (r.checksums) compare(p, memory);
                }
            }
            if (p.bounce) bounces_.push_back(p.bounce);
            queue_.finish(p);
        }

        bool move_rest(Piece& p, int64_t moved) {
            Request& r = *p.request;
            char* memory = p.bounce ? p.bounce : r.memory + p.start;
            int fd = r.buffered[static_cast<size_t>(p.file)];
            while (moved < p.nbytes) {
                bool is_cut = moved == 0 && (p.fault == kShort || p.fault == kEnd);
                auto rest = static_cast<size_t>(is_cut ? (p.nbytes + 1) / 2 : p.nbytes - moved);
                ssize_t now = 0;
                if (!(moved && p.fault == kEnd)) {
                    now = r.is_write ? pwrite(fd, memory + moved, rest, p.file_offset + moved)
                                     : pread(fd, memory + moved, rest, p.file_offset + moved);
                }
                if (now < 0 && errno == EINTR) continue;
                if (now <= 0) {
                    fail(p, now ? kOs : kShortfall, now ? errno : 0, 0, p.nbytes, moved);
                    return false;
                }
                moved += now;
            }
            return true;
        }

        void compare(const Piece& p, const char* memory) {
            const Request& r = *p.request;
            for (int64_t at = 0; at < p.nbytes; at += kChecked) {
                uint64_t expected = r.checksums[(p.start + at) / kChecked];
                uint64_t got = checksum(memory + at, r.offset + p.start + at);
                if (got != expected) return fail(p, kCorrupt, 0, at, static_cast<int64_t>(expected), static_cast<int64_t>(got));
            }
        }

        void fail(const Piece& p, Kind kind, int error, int64_t at, int64_t expected, int64_t got) {
            std::lock_guard<std::mutex> lock(queue_.mutex_);
            Failure& failure = p.request->failure;
            if (failure.kind != kFine) return;
            failure = {kind, error, p.file, 0, p.file_offset + at, static_cast<uint64_t>(expected), static_cast<uint64_t>(got)};
        }

        // An aligned buffer of a block, waited for while all are under way; none where memory is short: the page cache
        // serves then.
        char* bounce() {
            if (!arena_ && !make_bounces()) return nullptr;
            while (bounces_.empty()) {
                ring_->submit();
                reap(true);
            }
            char* found = bounces_.back();
            bounces_.pop_back();
            return found;
        }

        bool make_bounces() {
            auto nbytes = static_cast<size_t>(queue_.options_.block);
            int count = std::min(depth_, kMaxBounces);
            void* made = nullptr;
            if (posix_memalign(&made, kHugePage, nbytes * static_cast<size_t>(count))) return false;
#ifdef MADV_HUGEPAGE
            madvise(made, nbytes * static_cast<size_t>(count), MADV_HUGEPAGE);
#endif
            arena_ = static_cast<char*>(made);
            for (int i = 0; i < count; ++i) bounces_.push_back(arena_ + static_cast<size_t>(i) * nbytes);
            return true;
        }

        Queue& queue_;
        std::unique_ptr<Ring> ring_;
        int depth_;
        std::vector<Piece> slots_;
        std::vector<int> free_;
        std::vector<Completion> found_;
        char* arena_ = nullptr;  // all bounces; those not under way are in `bounces_`
        std::vector<char*> bounces_;
    };

    // Up to `room` pieces; waits for one if `waits`; -1 when the queue ends.
    int take(Piece* taken, int room, bool waits) {
        std::unique_lock<std::mutex> lock(mutex_);
        if (waits) work_.wait(lock, [&] { return is_stopping_ || !waiting_.empty(); });
        if (waits && waiting_.empty()) return -1;
        int count = 0;
        while (count < room && !waiting_.empty()) {
            Request& r = *waiting_.front();
            if (r.failure.kind != kFine) {
                r.next = r.nbytes;
                waiting_.pop_front();
                close_if_done(r);
                continue;
            }
            taken[count] = cut(r, options_.block);
            taken[count++].fault = next_fault();
            ++r.num_open;
            if (r.next == r.nbytes) waiting_.pop_front();
        }
        return count;
    }

    void finish(const Piece& piece) {
        std::lock_guard<std::mutex> lock(mutex_);
        --piece.request->num_open;
        close_if_done(*piece.request);
    }

    void close_if_done(Request& r) {
        if (r.num_open || r.next < r.nbytes || r.is_done) return;
        r.is_done = true;
        if (!--num_requests_) busy_s_ += since();
        done_.notify_all();
    }

    Fault next_fault() {
        if (fault_ == kNoFault || fault_after_-- > 0) return kNoFault;
        return std::exchange(fault_, kNoFault);
    }

    double since() const {
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - since_).count();
    }

    void stop() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            is_stopping_ = true;
            work_.notify_all();
        }
        for (auto& worker : workers_) worker.join();
        workers_.clear();
    }

    Options options_;
    std::mutex mutex_;
    std::condition_variable work_, done_;
    std::deque<Request*> waiting_;
    int64_t num_requests_ = 0;
    std::chrono::steady_clock::time_point since_;
    double busy_s_ = 0;
    bool is_stopping_ = false;
    Fault fault_ = kNoFault;
    int fault_after_ = 0;
    std::vector<std::thread> workers_;
};

std::unique_ptr<Queue> open_queue(int means, const Options& options, int* error) {
    std::vector<std::unique_ptr<Ring>> rings;
    int num_threads = options.threads;
    if (means == kThreads) {
        num_threads = static_cast<int>(std::min<int64_t>(kMaxThreads, static_cast<int64_t>(options.depth) * options.threads));
    } else {
        for (int i = 0; i < options.threads; ++i) {
            rings.push_back(open_ring(means, options.depth, error));
            if (!rings.back()) return nullptr;
        }
    }
    *error = 0;
    return std::make_unique<Queue>(options, std::move(rings), num_threads);
}

}  // namespace

// A queue by these means, or by the first that works here for 0; null with errno's value in `error`. `means` becomes what
// was taken. block_nbytes is a multiple of a page, and of 65536 where checksums are used.
DS_API void* ds_aio_open(int* means, int queue_depth, int num_threads, int64_t block_nbytes, int submits_singly, int overlaps,
                         int* error) {
    Options options{queue_depth, num_threads, block_nbytes, submits_singly != 0, overlaps != 0};
    try {
        for (int each : {kIoUring, kLibaio, kThreads}) {
            if (*means != kAuto && *means != each) continue;
            if (auto queue = open_queue(each, options, error)) {
                *means = each;
                return queue.release();
            }
        }
    } catch (const std::system_error& failed) {
        *error = failed.code().value();
    } catch (const std::bad_alloc&) {
        *error = ENOMEM;
    }
    return nullptr;
}

// Waits for what is under way.
DS_API void ds_aio_close(void* queue) { delete static_cast<Queue*>(queue); }

// A request under way; null where memory is short. Memory and descriptors are borrowed until it is done.
DS_API void* ds_aio_start(void* queue, int num_files, const int* direct, const int* buffered, int64_t stripe_nbytes,
                          int64_t offset, void* memory, int64_t nbytes, int is_write, uint64_t* checksums) {
    try {
        auto request = std::make_unique<Request>();
        request->direct.assign(direct, direct + num_files);
        request->buffered.assign(buffered, buffered + num_files);
        request->stripe = stripe_nbytes;
        request->offset = offset;
        request->nbytes = nbytes;
        request->memory = static_cast<char*>(memory);
        request->is_write = is_write != 0;
        request->checksums = checksums;
        static_cast<Queue*>(queue)->start(request.get());
        return request.release();
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

// 1 if it is done within that time.
DS_API int ds_aio_wait(void* queue, void* request, double timeout_s) {
    return static_cast<Queue*>(queue)->wait(static_cast<Request*>(request), timeout_s);
}

// What went wrong with a request that is done (kind 0: nothing); ends it.
DS_API void ds_aio_finish(void* request, Failure* failure) {
    std::unique_ptr<Request> ended(static_cast<Request*>(request));
    *failure = ended->failure;
}

// Seconds in which at least one request was under way.
DS_API double ds_aio_busy_s(void* queue) { return static_cast<Queue*>(queue)->busy_s(); }

// For tests: the piece after `after` others meets this fault.
DS_API void ds_aio_inject(void* queue, int fault, int after) {
    static_cast<Queue*>(queue)->inject(static_cast<Fault>(fault), after);
}

// Of 65536 bytes that belong at this offset; to measure its cost.
DS_API uint64_t ds_aio_checksum(const void* data, int64_t offset) {
    return checksum(static_cast<const char*>(data), offset);
}
