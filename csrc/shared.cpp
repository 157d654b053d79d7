// Counters in memory that processes of one host share: stored with everything before them visible, and waited for.
//
// Called by deepspeed/comm/board.py through ctypes. A counter is three words, 64 bytes to itself: its value, how many wait for it
// in the kernel, and the processor that its owner was last seen on. Values only grow, and are compared as a difference, so that
// they may wrap around.

#include "native.h"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>

#ifdef __linux__
#include <climits>
#include <ctime>
#include <sched.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

using Word = std::atomic<uint32_t>;
static_assert(sizeof(Word) == 4 && Word::is_always_lock_free, "words are shared with other processes");

Word& word(void* at) { return *static_cast<Word*>(at); }

bool has_reached(uint32_t value, uint32_t least) { return static_cast<int32_t>(value - least) >= 0; }

// This thread's processor, from 1 on; 0: not known.
uint32_t processor() {
#ifdef __linux__
    return static_cast<uint32_t>(sched_getcpu() + 1);
#else
    return 0;
#endif
}

}  // namespace

// 1 where processes can wait for each other's counters.
DS_API int ds_shared_is_supported() {
#ifdef __linux__
    return 1;
#else
    return 0;
#endif
}

// Set the counter at `at`, after all that was written before, and wake whoever waits.
DS_API void ds_shared_post(void* at, uint32_t value) {
    Word* words = static_cast<Word*>(at);
    words[2].store(processor(), std::memory_order_relaxed);
    words[0].store(value);
#ifdef __linux__
    if (words[1].load() != 0) syscall(SYS_futex, words, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
#endif
}

// Copy a message to where the others read it, then post it.
DS_API void ds_shared_put(void* at, uint32_t value, void* target, const void* source, int64_t nbytes) {
    std::memcpy(target, source, static_cast<size_t>(nbytes));
    ds_shared_post(at, value);
}

// Set a word that nobody sleeps on.
DS_API void ds_shared_store(void* at, uint32_t value) { word(at).store(value, std::memory_order_release); }

// 1 once each of `num` words from `at` on, but the one at `but`, has reached `least`.
DS_API int ds_shared_have_reached(void* at, int64_t num, int64_t but, uint32_t least) {
    Word* words = static_cast<Word*>(at);
    for (int64_t i = 0; i < num; ++i)
        if (i != but && !has_reached(words[i].load(std::memory_order_acquire), least)) return 0;
    return 1;
}

// Wait until the counter at `at` reaches `least`: looking at it for `spin_us`, then asleep. 0 where `timeout_ms` were over first.
// Who looks on the processor that the owner was last seen on keeps the owner from it, and sleeps at once.
DS_API int ds_shared_wait(void* at, uint32_t least, int64_t spin_us, int64_t timeout_ms) {
    using Clock = std::chrono::steady_clock;
    Word* words = static_cast<Word*>(at);
    if (has_reached(words[0].load(std::memory_order_acquire), least)) return 1;
    const auto begun = Clock::now();
    const auto awake = begun + std::chrono::microseconds(spin_us), end = begun + std::chrono::milliseconds(timeout_ms);
    while (Clock::now() < awake && words[2].load(std::memory_order_relaxed) != processor())
        for (int i = 0; i < 64; ++i)
            if (has_reached(words[0].load(std::memory_order_acquire), least)) return 1;
#ifdef __linux__
    words[1].fetch_add(1);
    for (;;) {
        const uint32_t seen = words[0].load();
        const auto left = std::chrono::duration_cast<std::chrono::nanoseconds>(end - Clock::now()).count();
        if (has_reached(seen, least) || left <= 0) break;
        timespec rest{static_cast<time_t>(left / 1000000000), static_cast<long>(left % 1000000000)};
        syscall(SYS_futex, words, FUTEX_WAIT, seen, &rest, nullptr, 0);
    }
    words[1].fetch_sub(1);
#endif
    return has_reached(words[0].load(std::memory_order_acquire), least) ? 1 : 0;
}
