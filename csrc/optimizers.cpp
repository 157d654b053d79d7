// One optimizer step over many runs: the C interface of the loops in kernels.h, called by deepspeed/kernels/native_optimizers.py.
//
//     run       |-------------- numel ---------------|   parameter, gradient, states, low-precision copy: one row of a table
//     chunks    |------------|------------|----------|   32 Ki elements, dealt to the threads
//     blocks    |--|--|--|--|                            1 Ki elements: what is not fp32 is widened into the first-level
//                                                        cache, the loop runs, what it changed is narrowed back
//
// So memory is read once and written once, whatever the dtypes. Chunks and blocks depend on a run alone, never on the
// number of threads, and LAMB's sums are made per chunk and added in order: results are the same on any machine.

#include <cmath>
#include <cstring>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "isa.h"
#include "kernels.h"
#include "native.h"
#include "threads.h"

namespace {

constexpr int64_t kChunk = 32 * 1024;

// As deepspeed/kernels/native_optimizers.py fills it; addresses are 0 where an optimizer has no such tensor.
struct Run {
    int64_t param, grad, first, second, low, numel;
};

struct Dtypes {
    int param, grad, state, low;
};

enum : int { kAdam, kLion, kAdagrad, kSgd, kLambMoments, kLambApply };

struct Operation {
    Loop loop;
    bool writes_param, writes_state;
};

Operation operation_of(const Kernels& kernels, int operation, int variant) {
    switch (operation) {
        case kAdam: return {kernels.adam[variant], true, true};
        case kLion: return {kernels.lion[variant], true, true};
        case kAdagrad: return {kernels.adagrad[variant], true, true};
        case kSgd: return {kernels.sgd[variant], true, true};
        case kLambMoments: return {kernels.lamb_moments[variant], false, true};
        default: return {kernels.lamb_apply[variant], true, false};
    }
}

// Writes that go past the caches: nobody reads the parameters' copy before the step has gone through all of memory.
void stream(uint16_t* to, const uint16_t* from, size_t n) {
#if defined(__SSE2__)
    for (; n > 0 && reinterpret_cast<uintptr_t>(to) % 16 != 0; --n) *to++ = *from++;
    for (; n >= 8; n -= 8, to += 8, from += 8)
        _mm_stream_si128(reinterpret_cast<__m128i*>(to), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
    std::memcpy(to, from, n * sizeof *to);
}

void end_streaming() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

struct Step {
    const Kernels& kernels;
    Operation operation;
    Dtypes dtypes;
    const Run* runs;
    const float* scalars;
    double* sums;
    bool streams;
    std::vector<int64_t> first_chunk;  // of each run, and their number

    // See Kernels; null where an optimizer has no such tensor.
    float* read(int64_t address, int dtype, int64_t offset, size_t n, float* scratch) const {
        return address ? kernels.read(reinterpret_cast<void*>(address), dtype, offset, n, scratch) : nullptr;
    }

    void write(int64_t address, int dtype, int64_t offset, size_t n, const float* values) const {
        if (address) kernels.write(reinterpret_cast<void*>(address), dtype, offset, n, values);
    }

    void chunk(int64_t index) const {
        size_t low = 0, high = first_chunk.size() - 1;
        while (high - low > 1) (first_chunk[(low + high) / 2] <= index ? low : high) = (low + high) / 2;
        const Run& run = runs[low];
        const float* own_scalars = scalars + low * kNumScalars;
        double* own_sums = sums ? sums + index * 2 * kNumLanes : nullptr;
        alignas(64) float param_f[kBlock], grad_f[kBlock], first_f[kBlock], second_f[kBlock];
        alignas(64) uint16_t low_h[kBlock];
        const int64_t start = (index - first_chunk[low]) * kChunk;
        const int64_t stop = run.numel - start < kChunk ? run.numel : start + kChunk;
        for (int64_t at = start; at < stop; at += kBlock) {
            const size_t n = static_cast<size_t>(stop - at < kBlock ? stop - at : kBlock);
            float* p = read(run.param, dtypes.param, at, n, param_f);
            float* g = read(run.grad, dtypes.grad, at, n, grad_f);
            float* first = read(run.first, dtypes.state, at, n, first_f);
            float* second = read(run.second, dtypes.state, at, n, second_f);
            operation.loop(p, g, first, second, n, own_scalars, own_sums);
            if (operation.writes_state) {
                write(run.first, dtypes.state, at, n, first);
                write(run.second, dtypes.state, at, n, second);
            }
            if (!operation.writes_param) continue;
            write(run.param, dtypes.param, at, n, p);
            if (run.low == 0) continue;
            uint16_t* to = reinterpret_cast<uint16_t*>(run.low) + at;
            kernels.narrow[dtypes.low - kBFloat16](p, streams ? low_h : to, n);
            if (streams) stream(to, low_h, n);
        }
        if (streams) end_streaming();
    }
};

// Below this many elements the copies stay in the caches, where the next forward finds them.
constexpr int64_t kStreamFrom = 4 << 20;

void run_step(const Operation& operation, const Run* runs, const float* scalars, int64_t num_runs, int64_t dtypes,
             int num_threads, double* squares) {
    const auto dtype = [&](int i) { return static_cast<int>(dtypes >> (4 * i) & 15); };
    Step step{current_kernels(), operation, {dtype(0), dtype(1), dtype(2), dtype(3)}, runs, scalars, nullptr, false,
              {0}};
    int64_t numel = 0;
    for (int64_t i = 0; i < num_runs; ++i) {
        numel += runs[i].numel;
        step.first_chunk.push_back(step.first_chunk.back() + (runs[i].numel + kChunk - 1) / kChunk);
    }
    step.streams = step.dtypes.low != kNone && numel >= kStreamFrom;
    const int64_t num_chunks = step.first_chunk.back();
    std::vector<double> sums(squares ? num_chunks * 2 * kNumLanes : 0);
    if (squares) step.sums = sums.data();
    const int64_t worth = numel / kChunk;
    if (num_threads > worth) num_threads = worth > 1 ? static_cast<int>(worth) : 1;
    parallel_for(num_chunks, num_threads, [](void* self, int64_t i) { static_cast<Step*>(self)->chunk(i); }, &step);
    if (squares)
        for (int64_t i = 0; i < num_runs; ++i) {
            squares[2 * i] = squares[2 * i + 1] = 0;
            for (int64_t j = step.first_chunk[i]; j < step.first_chunk[i + 1]; ++j)
                for (int k = 0; k < 2 * kNumLanes; ++k) squares[2 * i + k / kNumLanes] += sums[j * 2 * kNumLanes + k];
        }
}

}  // namespace

// One step. `operation` and `variant` name a loop of kernels.h; `runs` has num_runs rows of Run, `scalars` as many of
// kNumScalars floats; `dtypes` is four times 4 bits of Precision, for parameter, gradient, states and low-precision copy,
// from the lowest bits up. `squares` [num_runs, 2] receives the sums of squares of parameter and update (kLambMoments).
DS_API void ds_optimizer_step(int operation, int variant, const Run* runs, const float* scalars, int64_t num_runs,
                              int64_t dtypes, int num_threads, double* squares) {
    run_step(operation_of(current_kernels(), operation, variant), runs, scalars, num_runs, dtypes, num_threads,
             operation == kLambMoments ? squares : nullptr);
}
