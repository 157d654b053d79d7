// Group-wise int8 and int4, and signs with error feedback, over whole tensors: the C interface of quantize.inl's loops,
// called by deepspeed/kernels/native_quantize.py. Groups are dealt to the threads; a group is read twice, the second time
// from the caches. Results depend neither on threads nor on the instruction set.

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "isa.h"
#include "kernels.h"
#include "native.h"
#include "threads.h"

namespace {

constexpr int64_t kTask = 64 * 1024;  // elements per task, about: enough to be worth a thread, little enough to be even

struct Groups {
    const Kernels& kernels;
    int64_t numel, group_size, groups_per_task;
    int dtype;  // of the floating-point side
    int num_bits;
    bool symmetric;
    int64_t floats;
    uint8_t* values;
    float *scales, *minima;

    int64_t group_nbytes() const { return group_size * num_bits / 8; }

    // Elements [at, at + n) as fp32: in place, or widened into `scratch`.
    const float* read(int64_t at, size_t n, float* scratch) const {
        if (dtype == kFloat32) return reinterpret_cast<const float*>(floats) + at;
        kernels.widen[dtype - kBFloat16](reinterpret_cast<const uint16_t*>(floats) + at, scratch, n);
        return scratch;
    }

    // Calls body(elements from the group's first, number) block by block.
    template <class Body>
    void blocks(Body body) const {
        for (int64_t at = 0; at < group_size; at += kBlock)
            body(at, static_cast<size_t>(group_size - at < kBlock ? group_size - at : kBlock));
    }

    void quantize(int64_t group) const {
        alignas(64) float scratch[kBlock];
        const QuantizeLoops& loops = kernels.quantize;
        const int64_t first = group * group_size;
        float low = 0, high = 0;
        uint32_t largest = 0;
        const float* whole = group_size <= kBlock ? read(first, group_size, scratch) : nullptr;  // widened once
        if (!symmetric) low = high = whole ? *whole : *read(first, 1, scratch);
        blocks([&](int64_t at, size_t n) {
            const float* x = whole ? whole : read(first + at, n, scratch);
            const uint32_t found = loops.magnitude(x, n);
            largest = found > largest ? found : largest;
            if (!symmetric) loops.range(x, n, &low, &high);
        });
        const bool has_nan = largest > 0x7f800000;
        float magnitude;
        std::memcpy(&magnitude, &largest, sizeof magnitude);
        const float nan = std::numeric_limits<float>::quiet_NaN();
        const float top = static_cast<float>((1 << (symmetric ? num_bits - 1 : num_bits)) - 1);
        const float scale = has_nan ? nan : (symmetric ? magnitude : high - low) / top;
        scales[group] = scale;
        if (!symmetric) minima[group] = has_nan ? nan : low;
        const int offset = symmetric && num_bits == 4 ? 8 : 0;
        uint8_t* q = values + group * group_nbytes();
        if (!(scale > 0) || std::isinf(scale)) {  // nothing to divide by: zero, in the format's own form
            std::memset(q, offset | offset << 4, group_nbytes());
            return;
        }
        blocks([&](int64_t at, size_t n) {
            const float* x = whole ? whole : read(first + at, n, scratch);
            if (num_bits == 8)
                loops.to_bytes(x, q + at, n, symmetric ? 0.0f : low, scale, offset);
            else
                loops.to_nibbles(x, q + at / 2, n, symmetric ? 0.0f : low, scale, offset);
        });
    }

    void dequantize(int64_t group) const {
        alignas(64) float scratch[kBlock];
        const QuantizeLoops& loops = kernels.quantize;
        const float low = symmetric ? 0.0f : minima[group], scale = scales[group];
        const uint8_t* q = values + group * group_nbytes();
        blocks([&](int64_t at, size_t n) {
            const int64_t to = group * group_size + at;
            float* x = dtype == kFloat32 ? reinterpret_cast<float*>(floats) + to : scratch;
            if (num_bits == 8)
                loops.from_bytes[symmetric](q + at, x, n, low, scale);
            else
                loops.from_nibbles(q + at / 2, x, n, low, scale, symmetric ? 8 : 0);
            if (x == scratch) kernels.narrow[dtype - kBFloat16](x, reinterpret_cast<uint16_t*>(floats) + to, n);
        });
    }
};

template <void (Groups::*work)(int64_t) const>
void each_group(Groups& groups, int64_t num_groups, int num_threads) {
    const int64_t per_task = groups.groups_per_task = groups.group_size < kTask ? kTask / groups.group_size : 1;
    const auto task = [](void* self, int64_t index) {
        const Groups& all = *static_cast<Groups*>(self);
        const int64_t count = all.numel / all.group_size;
        const int64_t start = index * all.groups_per_task, stop = start + all.groups_per_task;
        for (int64_t group = start; group < stop && group < count; ++group) (all.*work)(group);
    };
    parallel_for((num_groups + per_task - 1) / per_task, num_threads, task, &groups);
}

struct Signs {
    const Kernels& kernels;
    const float* x;
    float* error;
    uint8_t* bits;
    int64_t numel;
    float scale;
    double* sums;  // [number of tasks, kNumLanes]
};

int64_t num_tasks(int64_t numel) { return (numel + kTask - 1) / kTask; }

// Calls body(first element, number) over one task's blocks.
template <class Body>
void blocks_of(int64_t index, int64_t numel, Body body) {
    const int64_t stop = (index + 1) * kTask < numel ? (index + 1) * kTask : numel;
    for (int64_t at = index * kTask; at < stop; at += kBlock)
        body(at, static_cast<size_t>(stop - at < kBlock ? stop - at : kBlock));
}

}  // namespace

// `floats` [numel] of a Precision; `values` [numel * num_bits / 8], `scales` and `minima` [numel / group_size], of which the
// last is not touched if `symmetric`. group_size divides numel, and is even where num_bits is 4.
DS_API void ds_quantize(int64_t floats, int dtype, int64_t numel, int64_t group_size, int num_bits, int symmetric,
                        uint8_t* values, float* scales, float* minima, int num_threads) {
    Groups groups{current_kernels(), numel, group_size, 1, dtype, num_bits, symmetric != 0, floats, values, scales, minima};
    each_group<&Groups::quantize>(groups, numel / group_size, num_threads);
}

// The inverse, within half a scale.
DS_API void ds_dequantize(int64_t floats, int dtype, int64_t numel, int64_t group_size, int num_bits, int symmetric,
                          uint8_t* values, float* scales, float* minima, int num_threads) {
    Groups groups{current_kernels(), numel, group_size, 1, dtype, num_bits, symmetric != 0, floats, values, scales, minima};
    each_group<&Groups::dequantize>(groups, numel / group_size, num_threads);
}

// error += x; bits [numel / 8] receives its signs and `error` keeps what scale * sign does not say. Returns the scale,
// ||error|| / sqrt(numel). numel is a multiple of 8 and above 0.
DS_API float ds_compress_signs(const float* x, float* error, uint8_t* bits, int64_t numel, int num_threads) {
    std::vector<double> sums(static_cast<size_t>(num_tasks(numel)) * kNumLanes);
    Signs signs{current_kernels(), x, error, bits, numel, 0.0f, sums.data()};
    parallel_for(num_tasks(numel), num_threads, [](void* self, int64_t index) {
        Signs& all = *static_cast<Signs*>(self);
        blocks_of(index, all.numel, [&](int64_t at, size_t n) {
            all.kernels.quantize.square_sums(all.x + at, all.error + at, n, all.sums + index * kNumLanes);
        });
    }, &signs);
    double total = 0;
    for (const double sum : sums) total += sum;
    signs.scale = static_cast<float>(std::sqrt(total / static_cast<double>(numel)));
    parallel_for(num_tasks(numel), num_threads, [](void* self, int64_t index) {
        Signs& all = *static_cast<Signs*>(self);
        blocks_of(index, all.numel, [&](int64_t at, size_t n) {
            all.kernels.quantize.take_signs(all.x + at, all.error + at, all.bits + at / 8, n, all.scale);
        });
    }, &signs);
    return signs.scale;
}

// into += scale * sign.
DS_API void ds_add_signs(uint8_t* bits, float* into, int64_t numel, float scale, int num_threads) {
    Signs signs{current_kernels(), nullptr, into, bits, numel, scale, nullptr};
    parallel_for(num_tasks(numel), num_threads, [](void* self, int64_t index) {
        Signs& all = *static_cast<Signs*>(self);
        blocks_of(index, all.numel, [&](int64_t at, size_t n) {
            all.kernels.quantize.add_signs(all.bits + at / 8, all.error + at, n, all.scale);
        });
    }, &signs);
}
