// parallel_for: see threads.h. Threads are made when first needed, wait on a condition variable, and are never joined.
//
// Each participant owns a contiguous range of tasks (pages that it touched first stay near it) and takes from the
// others' ranges when its own is done (a core that is busy elsewhere does not hold up the rest).

#include "threads.h"

#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

#ifdef __linux__
#include <dirent.h>
#include <sched.h>
#endif
#include <unistd.h>

namespace {

struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
};

struct Job {
    void (*task)(void*, int64_t);
    void* context;
    std::unique_ptr<Range[]> ranges;
    int num_participants;
    std::fenv_t float_modes;

    void take_part(int participant) {
        for (int i = 0; i < num_participants; ++i) {
            Range& range = ranges[(participant + i) % num_participants];
            for (int64_t index; (index = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;)
                task(context, index);
        }
    }
};

// A thread inherits the affinity of its maker. Where OpenMP bound the maker to one core, all of ours would share it;
// so they may run wherever any thread of this process may.
void widen_affinity() {
#ifdef __linux__
    cpu_set_t all, one;
    CPU_ZERO(&all);
    DIR* tasks = opendir("/proc/self/task");
    if (!tasks) return;
    while (const dirent* entry = readdir(tasks)) {
        const int id = std::atoi(entry->d_name);
        if (id > 0 && sched_getaffinity(id, sizeof one, &one) == 0) CPU_OR(&all, &all, &one);
    }
    closedir(tasks);
    if (CPU_COUNT(&all) > 0) sched_setaffinity(0, sizeof all, &all);
#endif
}

class Pool {
   public:
    const pid_t owner = getpid();
    std::mutex in_use;

    void run(Job& job) {
        const int helpers = grow(job.num_participants - 1);
        {
            std::lock_guard<std::mutex> guard(lock_);
            job_ = &job;
            num_wanted_ = num_running_ = helpers;
            ++generation_;
        }
        if (helpers > 0) wake_.notify_all();
        job.take_part(0);
        std::unique_lock<std::mutex> guard(lock_);
        done_.wait(guard, [this] { return num_running_ == 0; });
        job_ = nullptr;
    }

   private:
    std::mutex lock_;
    std::condition_variable wake_, done_;
    Job* job_ = nullptr;
    uint64_t generation_ = 0;
    int num_threads_ = 0, num_wanted_ = 0, num_running_ = 0;

    int grow(int wanted) {
        while (num_threads_ < wanted) {
            const uint64_t seen = generation_;
            const int participant = num_threads_ + 1;
            try {
                std::thread([this, participant, seen] { live(participant, seen); }).detach();
            } catch (const std::system_error&) {
                break;  // the system gives no more threads: those there are do all of the work
            }
            ++num_threads_;
        }
        return wanted < num_threads_ ? wanted : num_threads_;
    }

    void live(int participant, uint64_t seen) {
        widen_affinity();
        for (;;) {
            std::unique_lock<std::mutex> guard(lock_);
            wake_.wait(guard, [&] { return generation_ != seen; });
            seen = generation_;
            if (participant > num_wanted_) continue;
            Job& job = *job_;
            guard.unlock();
            std::fesetenv(&job.float_modes);
            job.take_part(participant);
            guard.lock();
            if (--num_running_ == 0) done_.notify_one();
        }
    }
};

// A forked child has none of its parent's threads, and may have copied the locks while they were held: it gets a new
// pool. Pools are never destroyed, since their threads outlive static destructors.
Pool& pool() {
    static std::atomic<Pool*> current{nullptr};
    Pool* found = current.load();
    while (!found || found->owner != getpid()) {
        Pool* made = new Pool;
        if (current.compare_exchange_strong(found, made)) return *made;
        delete made;
    }
    return *found;
}

}  // namespace

void parallel_for(int64_t num_tasks, int num_threads, void (*task)(void*, int64_t), void* context) {
    const int participants = static_cast<int>(num_tasks < num_threads ? num_tasks : num_threads);
    Pool* const mine = participants > 1 ? &pool() : nullptr;
    if (!mine || !mine->in_use.try_lock()) {
        for (int64_t i = 0; i < num_tasks; ++i) task(context, i);
        return;
    }
    Job job{task, context, std::make_unique<Range[]>(participants), participants, {}};
    std::fegetenv(&job.float_modes);
    for (int i = 0; i < participants; ++i) {
        job.ranges[i].next = num_tasks * i / participants;
        job.ranges[i].end = num_tasks * (i + 1) / participants;
    }
    mine->run(job);
    mine->in_use.unlock();
}
