// The loops for what every processor of an architecture has: SSE2 on x86-64, NEON on 64-bit ARM.

#include "kernels.h"

#include <cmath>
#include <cstring>

namespace {

void widen_fp16(const uint16_t* from, float* to, size_t n);
void narrow_fp16(const float* from, uint16_t* to, size_t n);

#include "kernels.inl"

// IEEE half precision by integer arithmetic, bit for bit what the processors' own instructions give. Subnormals go
// through a sum of floats that aligns their bits: x + 2^-14 and back is exact on the way up, rounds to even on the way down.
void widen_fp16(const uint16_t* __restrict from, float* __restrict to, size_t n) {
    for (size_t i = 0; i < n; ++i) {
        const uint32_t half = from[i];
        const uint32_t magnitude = (half & 0x7fff) << 13;
        const float normal = float_of(magnitude + (112u << 23));
        const float special = float_of(magnitude | 0x7f800000 | ((half & 0x3ff) ? 0x400000 : 0));
        const float subnormal = float_of((113u << 23) + magnitude) - float_of(113u << 23);
        const float value = (half & 0x7c00) == 0x7c00 ? special : (half & 0x7c00) == 0 ? subnormal : normal;
        to[i] = float_of(bits_of(value) | (half & 0x8000) << 16);
    }
}

void narrow_fp16(const float* __restrict from, uint16_t* __restrict to, size_t n) {
    for (size_t i = 0; i < n; ++i) {
        const uint32_t bits = bits_of(from[i]);
        const uint32_t magnitude = bits & 0x7fffffff;
        const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
        const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - (126u << 23);
        const uint32_t nan = 0x7e00 | ((magnitude >> 13) & 0x3ff);
        uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
        half = magnitude >= 0x477ff000 ? 0x7c00 : half;  // 65520, half way from the largest half to the next power of two
        half = magnitude > 0x7f800000 ? nan : half;
        to[i] = static_cast<uint16_t>(half | (bits >> 16 & 0x8000));
    }
}

}  // namespace

const Kernels kPortableKernels = kTable;
