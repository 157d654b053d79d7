// Messages of ranks, added up in one pass over memory; called by deepspeed/kernels/native_sums.py and deepspeed/comm/board.py.
//
// Sums are made in fp32, in the order of the parts, and divided; each operation is rounded once. What is not fp32 is widened and
// narrowed block by block in the first-level cache.

#include "isa.h"
#include "kernels.h"
#include "native.h"
#include "threads.h"

namespace {

constexpr int64_t kChunkNumel = 32 * 1024;  // what a thread takes at a time

struct Sum {
    const Kernels& kernels;
    const void* const* parts;
    int64_t num_parts;
    int part_dtype;
    void* out;
    int out_dtype;
    float divide_by;
    bool accumulates;
    int64_t numel;

    void block(int64_t at, size_t n) const {
        alignas(64) float total[kBlock], part_f[kBlock], out_f[kBlock];
        const float* const first = kernels.read(parts[0], part_dtype, at, n, total);
        kernels.add(first, kernels.read(parts[1], part_dtype, at, n, part_f), total, n);
        for (int64_t i = 2; i < num_parts; ++i) kernels.add(total, kernels.read(parts[i], part_dtype, at, n, part_f), total, n);
        float* const to = out_dtype == kFloat32 || accumulates ? kernels.read(out, out_dtype, at, n, out_f) : out_f;
        kernels.divide[accumulates](total, divide_by, to, n);
        kernels.write(out, out_dtype, at, n, to);
    }

    void chunk(int64_t index) const {
        const int64_t start = index * kChunkNumel, stop = numel - start < kChunkNumel ? numel : start + kChunkNumel;
        for (int64_t at = start; at < stop; at += kBlock) block(at, static_cast<size_t>(stop - at < kBlock ? stop - at : kBlock));
    }
};

}  // namespace

// out [numel] = (parts[0] + parts[1] + ...) / divide_by, or that added to it. At least two parts, of one Precision; `out`, of any,
// may be one of them.
DS_API void ds_add_up(const void* const* parts, int64_t num_parts, int part_dtype, void* out, int out_dtype, int64_t numel,
                      float divide_by, int accumulates, int num_threads) {
    const Sum sum{current_kernels(), parts, num_parts, part_dtype, out, out_dtype, divide_by, accumulates != 0, numel};
    const int64_t num_chunks = (numel + kChunkNumel - 1) / kChunkNumel;
    parallel_for(num_chunks, num_threads, [](void* self, int64_t i) { static_cast<const Sum*>(self)->chunk(i); },
                 const_cast<Sum*>(&sum));
}
