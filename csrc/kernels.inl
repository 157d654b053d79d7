// The loops of kernels.h, to be included once per instruction set inside a namespace of its own. The includer defines
// widen_fp16 and narrow_fp16, which have hardware of their own; everything else is left to the compiler's vectoriser.
//
// Adam: arXiv:1412.6980, AdamW: arXiv:1711.05101, Lion: arXiv:2302.06675, LAMB: arXiv:1904.00962, Adagrad: JMLR 12.

static inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

#ifdef __clang__
#define DS_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define DS_INDEPENDENT _Pragma("GCC ivdep")
#endif

// body(i) for each i in [0, n), in any order. Asks for the arrays' memory 1 KiB ahead, for the second-level cache: four
// streams keep more requests under way than the processor's own prefetcher makes, and blocks that are widened fill the first
// (Zen 4, one thread, 25M elements of Adam: 2 KiB ahead into the first level 16.5 ms, so 14.5; bf16 parameters 21.0, 17.2).
template <class Body, class... Arrays>
static inline __attribute__((always_inline)) void for_each(size_t n, Body body, const Arrays*... arrays) {
    constexpr size_t line = 16, ahead = 1024;
    size_t start = 0;
    for (; start + line <= n; start += line) {
        (__builtin_prefetch(arrays + start + ahead / sizeof *arrays, 0, 2), ...);
        DS_INDEPENDENT
        for (size_t j = 0; j < line; ++j) body(start + j);
    }
    for (; start < n; ++start) body(start);
}

static void widen_bf16(const uint16_t* __restrict from, float* __restrict to, size_t n) {
    size_t i = 0;
#ifdef DS_HAS_AVX2
    for (; i + 32 <= n; i += 32) {
        __builtin_prefetch(from + i + kBlock);
        for (size_t j = i; j < i + 32; j += 8) {
            const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j));
            _mm256_storeu_ps(to + j, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16)));
        }
    }
#endif
    for (; i < n; ++i) to[i] = float_of(static_cast<uint32_t>(from[i]) << 16);
}

static void narrow_bf16(const float* __restrict from, uint16_t* __restrict to, size_t n) {
    for (size_t i = 0; i < n; ++i) {
        const uint32_t bits = bits_of(from[i]);
        const uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        const uint32_t quiet_nan = (bits >> 16) | 0x40;
        to[i] = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? quiet_nan : nearest);
    }
}

static void add(const float* a, const float* b, float* to, size_t n) {
    DS_INDEPENDENT
    for (size_t i = 0; i < n; ++i) to[i] = a[i] + b[i];
}

template <bool adds>
static void divide(const float* x, float by, float* to, size_t n) {
    DS_INDEPENDENT
    for (size_t i = 0; i < n; ++i) to[i] = adds ? to[i] + x[i] / by : x[i] / by;
}

// (1-w) a + w b, in the form that is exact at the nearer end. `keep` is 1-w, rounded on its own.
static inline float mix(float a, float b, float w, float keep) {
    const float distance = b - a;
    return w < 0.5f ? a + w * distance : b - keep * distance;
}

// (1-w) v + w g^2. The square is weighed while it is made, so that it overflows no sooner than need be; what is infinite
// stays so, where the first form alone would give NaN.
static inline float mix_square(float v, float g, float w, float keep) {
    const float square = w * g * g;
    const float mixed = w < 0.5f ? v + (square - w * v) : keep * v + square;
    return v == float_of(0x7f800000) ? v + square : mixed;
}

// The decay is added to the update rather than taken off the parameter first, so that the parameter is rounded once; the
// step's size s = lr/(1-b1^t) is in the denominator, where it costs no rounding.
// 0 gradient factor, 1 b1, 2 1-b1, 3 b2, 4 1-b2, 5 lr*decay or L2 decay, 6 1/(s sqrt(1-b2^t)), 7 eps/s
template <int decay>
static void adam(float* __restrict p, const float* __restrict g, float* __restrict m, float* __restrict v, size_t n,
                 const float* scalars, double*) {
    const float factor = scalars[0], keep1 = scalars[1], w1 = scalars[2], keep2 = scalars[3], w2 = scalars[4],
                rate = scalars[5], root_factor = scalars[6], eps = scalars[7];
    for_each(n, [=](size_t i) __attribute__((always_inline)) {
        float grad = g[i] * factor;
        if (decay == kL2) grad += rate * p[i];
        const float mean = m[i] = mix(m[i], grad, w1, keep1);
        const float square = v[i] = mix_square(v[i], grad, w2, keep2);
        float update = mean / (std::sqrt(square) * root_factor + eps);
        if (decay == kDecoupled) update += rate * p[i];
        p[i] -= update;
    }, p, g, m, v);
}

// 0 gradient factor, 1 b1, 2 1-b1, 3 b2, 4 1-b2, 5 lr*decay, 6 lr
template <int decay>
static void lion(float* __restrict p, const float* __restrict g, float* __restrict m, float*, size_t n,
                 const float* scalars, double*) {
    const float factor = scalars[0], keep1 = scalars[1], w1 = scalars[2], keep2 = scalars[3], w2 = scalars[4],
                rate = scalars[5], lr = scalars[6];
    for_each(n, [=](size_t i) __attribute__((always_inline)) {
        const float grad = g[i] * factor;
        const float direction = mix(m[i], grad, w1, keep1);
        float update = direction > 0 ? lr : direction < 0 ? -lr : 0.0f;  // as torch.sign, also for NaN
        if (decay == kDecoupled) update += rate * p[i];
        p[i] -= update;
        m[i] = mix(m[i], grad, w2, keep2);
    }, p, g, m);
}

// 0 gradient factor, 1 L2 decay, 2 lr, 3 eps
template <int decay>
static void adagrad(float* __restrict p, const float* __restrict g, float* __restrict sum, float*, size_t n,
                    const float* scalars, double*) {
    const float factor = scalars[0], rate = scalars[1], lr = scalars[2], eps = scalars[3];
    for_each(n, [=](size_t i) __attribute__((always_inline)) {
        float grad = g[i] * factor;
        if (decay) grad += rate * p[i];
        const float total = sum[i] += grad * grad;
        p[i] -= lr * (grad / (std::sqrt(total) + eps));
    }, p, g, sum);
}

// 0 gradient factor, 1 L2 decay, 2 lr, 3 momentum, 4 weight of the gradient in it
template <int momentum>
static void sgd(float* __restrict p, const float* __restrict g, float* __restrict buffer, float*, size_t n,
                const float* scalars, double*) {
    const float factor = scalars[0], rate = scalars[1], lr = scalars[2], keep = scalars[3], w = scalars[4];
    for_each(n, [=](size_t i) __attribute__((always_inline)) {
        float grad = g[i] * factor;
        if (rate != 0) grad += rate * p[i];
        if (momentum != kPlain) {
            const float moved = buffer[i] = keep * buffer[i] + w * grad;
            grad = momentum == kNesterov ? grad + keep * moved : moved;
        }
        p[i] -= lr * grad;
    }, p, g, momentum == kPlain ? g : buffer);
}

static void add_squares(const float* __restrict x, size_t n, double* __restrict sums) {
    double lanes[kNumLanes];
    std::memcpy(lanes, sums, sizeof lanes);
    size_t start = 0;
    for (; start + kNumLanes <= n; start += kNumLanes)
        for (size_t j = 0; j < kNumLanes; ++j) lanes[j] += static_cast<double>(x[start + j]) * x[start + j];
    for (size_t j = 0; start + j < n; ++j) lanes[j] += static_cast<double>(x[start + j]) * x[start + j];
    std::memcpy(sums, lanes, sizeof lanes);
}

// LAMB's update before its ratio. 5 decay, 6 1/(1-b1^t), 7 1/(1-b2^t), 8 eps
template <bool eps_inside>
static inline float lamb_update(float p, float mean, float square, const float* s) {
    const float corrected = square * s[7];
    const float denominator = eps_inside ? std::sqrt(corrected + s[8]) : std::sqrt(corrected) + s[8];
    const float update = mean * s[6] / denominator;
    return s[5] != 0 ? update + s[5] * p : update;
}

// 0 gradient factor, 1 b1, 2 1-b1, 3 b2, 4 1-b2, then those of lamb_update; adds the squares of p and of the update to
// `sums`, lane i % kNumLanes, so that they are the same whatever the width of the registers.
template <bool eps_inside>
static void lamb_moments(float* __restrict p, const float* __restrict g, float* __restrict m, float* __restrict v,
                         size_t n, const float* scalars, double* sums) {
    const float factor = scalars[0], keep1 = scalars[1], w1 = scalars[2], keep2 = scalars[3], w2 = scalars[4];
    float s[kNumScalars];
    std::memcpy(s, scalars, sizeof s);
    alignas(64) float updates[kBlock];
    float* const update = updates;
    for_each(n, [=](size_t i) __attribute__((always_inline)) {
        const float grad = g[i] * factor;
        const float mean = m[i] = mix(m[i], grad, w1, keep1);
        const float square = v[i] = mix_square(v[i], grad, w2, keep2);
        update[i] = lamb_update<eps_inside>(p[i], mean, square, s);
    }, p, g, m, v);
    add_squares(p, n, sums);
    add_squares(update, n, sums + kNumLanes);
}

// Those of lamb_update, and 9 lr*ratio
template <bool eps_inside>
static void lamb_apply(float* __restrict p, const float*, float* __restrict m, float* __restrict v, size_t n,
                       const float* scalars, double*) {
    float s[kNumScalars];
    std::memcpy(s, scalars, sizeof s);
    for_each(n, [=](size_t i) __attribute__((always_inline)) {
        p[i] -= s[9] * lamb_update<eps_inside>(p[i], m[i], v[i], s);
    }, p, m, v);
}

#include "lanes.inl"
#include "quantize.inl"
#include "products.inl"
#include "attention.inl"
#include "experts.inl"

static constexpr Kernels kTable = {
    {widen_bf16, widen_fp16},
    {narrow_bf16, narrow_fp16},
    add,
    {divide<false>, divide<true>},
    {adam<kNoDecay>, adam<kDecoupled>, adam<kL2>},
    {lion<kNoDecay>, lion<kDecoupled>},
    {adagrad<false>, adagrad<true>},
    {sgd<kPlain>, sgd<kHeavyBall>, sgd<kNesterov>},
    {lamb_moments<false>, lamb_moments<true>},
    {lamb_apply<false>, lamb_apply<true>},
    {magnitude, range, to_bytes, to_nibbles, {from_bytes<uint8_t>, from_bytes<int8_t>}, from_nibbles, square_sums,
     take_signs, add_signs},
    kProducts,
    {{score<ReadFloats>, score<ReadBFloats>}, nullptr, score_bytes, largest, {weigh<0>, weigh<8>, weigh<16>}, weigh_words,
     scale_sums, to_floats, add_scaled, to_words,
     {mix<ReadFloats>, mix<ReadBFloats>}, nullptr, mix_bytes, gather, spread, nullptr, shorten, 2},
    {padded, experts_scratch, expert_forward, expert_backward},
};
