// Experts with gated MLPs in fp32, forward and backward; called by deepspeed/kernels/native_experts.py.
// One thread, one expert after the other: they add to the same tokens.

#include <cstring>
#include <vector>

#include "isa.h"
#include "kernels.h"
#include "native.h"

namespace {

float* scratch_for(size_t numel) {
    static thread_local std::vector<float> scratch;
    if (scratch.size() < numel + 16) scratch.resize(numel + 16);
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(scratch.data()) + 63) / 64 * 64);
}

}  // namespace

// Floats per feature that are kept for `count` rows of an expert.
DS_API int64_t ds_experts_room(int64_t count) {
    return static_cast<int64_t>(current_kernels().experts.room(static_cast<size_t>(count)));
}

// out [tokens, width] += what experts give: tokens [., width], at [rows] sorted by expert, factors [rows], counts [experts], up
// [experts, 2 * inner, width], down [experts, width, inner]; before [sum of rooms, 2 * inner] is kept for the backward.
DS_API void ds_experts_forward(const float* tokens, const int64_t* at, const float* factors, const int64_t* counts, int64_t num_experts,
                               int64_t width, int64_t inner, const float* up, const float* down, float* before, float* out) {
    const ExpertLoops& loops = current_kernels().experts;
    const ExpertCall call{tokens, nullptr, out, nullptr, static_cast<size_t>(width), static_cast<size_t>(inner)};
    float* const scratch = scratch_for(loops.scratch(call.width, call.inner));
    for (int64_t e = 0; e < num_experts; ++e) {
        const size_t count = static_cast<size_t>(counts[e]);
        loops.forward(call, up + e * 2 * inner * width, down + e * width * inner, at, factors, count, before, scratch);
        at += count, factors += count, before += loops.room(count) * 2 * call.inner;
    }
}

// The gradients of the same. of_tokens [., width] is added to; of_up and of_down are written; each may be null.
DS_API void ds_experts_backward(const float* tokens, const float* gradient, const int64_t* at, const float* factors, const int64_t* counts,
                                int64_t num_experts, int64_t width, int64_t inner, const float* up, const float* down,
                                const float* before, float* of_tokens, float* of_factors, float* of_up, float* of_down) {
    const ExpertLoops& loops = current_kernels().experts;
    const ExpertCall call{tokens, gradient, nullptr, of_tokens, static_cast<size_t>(width), static_cast<size_t>(inner)};
    const int64_t of_each = width * inner;
    float* const scratch = scratch_for(loops.scratch(call.width, call.inner));
    for (int64_t e = 0; e < num_experts; ++e) {
        const size_t count = static_cast<size_t>(counts[e]);
        float *const this_up = of_up ? of_up + 2 * e * of_each : nullptr, *const this_down = of_down ? of_down + e * of_each : nullptr;
        if (!count && of_up) std::memset(this_up, 0, 2 * of_each * sizeof(float));
        if (!count && of_down) std::memset(this_down, 0, of_each * sizeof(float));
        loops.backward(call, up + 2 * e * of_each, down + e * of_each, at, factors, count, before, of_factors, this_up, this_down, scratch);
        at += count, factors += count, of_factors += count, before += loops.room(count) * 2 * call.inner;
    }
}
