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

static void widen_bf16(const uint16_t* __restrict from, float* __restrict to, size_t n) {
    for (size_t i = 0; i < n; ++i) to[i] = float_of(static_cast<uint32_t>(from[i]) << 16);
}

static void narrow_bf16(const float* __restrict from, uint16_t* __restrict to, size_t n) {
    for (size_t i = 0; i < n; ++i) {
        const uint32_t bits = bits_of(from[i]);
        const uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        const uint32_t quiet_nan = (bits >> 16) | 0x40;
        to[i] = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? quiet_nan : nearest);
    }
}

// (1-w) a + w b, in the form that is exact at the nearer end. `keep` is 1-w, rounded on its own.
static inline float mix(float a, float b, float w, float keep) {
    const float distance = b - a;
    return w < 0.5f ? a + w * distance : b - keep * distance;
}

// The same for second moments, which stay infinite once they have overflowed, where the form above gives NaN.
static inline float mix_squares(float v, float square, float w, float keep) {
    const float mixed = mix(v, square, w, keep);
    return v == float_of(0x7f800000) ? v + square : mixed;
}

// The decay is added to the update rather than taken off the parameter first, so that the parameter is rounded once.
// 0 gradient factor, 1 b1, 2 1-b1, 3 b2, 4 1-b2, 5 lr*decay or L2 decay, 6 lr/(1-b1^t), 7 1/sqrt(1-b2^t), 8 eps
template <int decay>
static void adam(float* __restrict p, const float* __restrict g, float* __restrict m, float* __restrict v, size_t n,
                 const float* scalars, double*) {
    const float factor = scalars[0], keep1 = scalars[1], w1 = scalars[2], keep2 = scalars[3], w2 = scalars[4],
                rate = scalars[5], step = scalars[6], root_factor = scalars[7], eps = scalars[8];
    for (size_t i = 0; i < n; ++i) {
        float grad = g[i] * factor;
        if (decay == kL2) grad += rate * p[i];
        const float mean = m[i] = mix(m[i], grad, w1, keep1);
        const float square = v[i] = mix_squares(v[i], grad * grad, w2, keep2);
        float update = step * (mean / (std::sqrt(square) * root_factor + eps));
        if (decay == kDecoupled) update += rate * p[i];
        p[i] -= update;
    }
}

// 0 gradient factor, 1 b1, 2 1-b1, 3 b2, 4 1-b2, 5 lr*decay, 6 lr
template <int decay>
static void lion(float* __restrict p, const float* __restrict g, float* __restrict m, float*, size_t n,
                 const float* scalars, double*) {
    const float factor = scalars[0], keep1 = scalars[1], w1 = scalars[2], keep2 = scalars[3], w2 = scalars[4],
                rate = scalars[5], lr = scalars[6];
    for (size_t i = 0; i < n; ++i) {
        const float grad = g[i] * factor;
        const float direction = mix(m[i], grad, w1, keep1);
        float update = direction > 0 ? lr : direction < 0 ? -lr : 0.0f;  // as torch.sign, also for NaN
        if (decay == kDecoupled) update += rate * p[i];
        p[i] -= update;
        m[i] = mix(m[i], grad, w2, keep2);
    }
}

// 0 gradient factor, 1 L2 decay, 2 lr, 3 eps
template <int decay>
static void adagrad(float* __restrict p, const float* __restrict g, float* __restrict sum, float*, size_t n,
                    const float* scalars, double*) {
    const float factor = scalars[0], rate = scalars[1], lr = scalars[2], eps = scalars[3];
    for (size_t i = 0; i < n; ++i) {
        float grad = g[i] * factor;
        if (decay) grad += rate * p[i];
        const float total = sum[i] += grad * grad;
        p[i] -= lr * (grad / (std::sqrt(total) + eps));
    }
}

// 0 gradient factor, 1 L2 decay, 2 lr, 3 momentum, 4 weight of the gradient in it
template <int momentum>
static void sgd(float* __restrict p, const float* __restrict g, float* __restrict buffer, float*, size_t n,
                const float* scalars, double*) {
    const float factor = scalars[0], rate = scalars[1], lr = scalars[2], keep = scalars[3], w = scalars[4];
    for (size_t i = 0; i < n; ++i) {
        float grad = g[i] * factor;
        if (rate != 0) grad += rate * p[i];
        if (momentum != kPlain) {
            const float moved = buffer[i] = keep * buffer[i] + w * grad;
            grad = momentum == kNesterov ? grad + keep * moved : moved;
        }
        p[i] -= lr * grad;
    }
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
    double of_param[kNumLanes], of_update[kNumLanes];
    std::memcpy(of_param, sums, sizeof of_param);
    std::memcpy(of_update, sums + kNumLanes, sizeof of_update);
    for (size_t start = 0; start < n; start += kNumLanes) {
        const size_t lanes = n - start < kNumLanes ? n - start : kNumLanes;
        float update[kNumLanes] = {}, param[kNumLanes] = {};
        const auto lane = [&](size_t j) __attribute__((always_inline)) {
            const size_t i = start + j;
            const float grad = g[i] * factor;
            const float mean = m[i] = mix(m[i], grad, w1, keep1);
            const float square = v[i] = mix_squares(v[i], grad * grad, w2, keep2);
            param[j] = p[i];
            update[j] = lamb_update<eps_inside>(p[i], mean, square, s);
        };
        if (lanes == kNumLanes)
            for (size_t j = 0; j < kNumLanes; ++j) lane(j);
        else
            for (size_t j = 0; j < lanes; ++j) lane(j);
        for (int j = 0; j < kNumLanes; ++j) {
            of_param[j] += static_cast<double>(param[j]) * param[j];
            of_update[j] += static_cast<double>(update[j]) * update[j];
        }
    }
    std::memcpy(sums, of_param, sizeof of_param);
    std::memcpy(sums + kNumLanes, of_update, sizeof of_update);
}

// Those of lamb_update, and 9 lr*ratio
template <bool eps_inside>
static void lamb_apply(float* __restrict p, const float*, float* __restrict m, float* __restrict v, size_t n,
                       const float* scalars, double*) {
    float s[kNumScalars];
    std::memcpy(s, scalars, sizeof s);
    for (size_t i = 0; i < n; ++i) p[i] -= s[9] * lamb_update<eps_inside>(p[i], m[i], v[i], s);
}

static constexpr Kernels kTable = {
    {widen_bf16, widen_fp16},
    {narrow_bf16, narrow_fp16},
    {adam<kNoDecay>, adam<kDecoupled>, adam<kL2>},
    {lion<kNoDecay>, lion<kDecoupled>},
    {adagrad<false>, adagrad<true>},
    {sgd<kPlain>, sgd<kHeavyBall>, sgd<kNesterov>},
    {lamb_moments<false>, lamb_moments<true>},
    {lamb_apply<false>, lamb_apply<true>},
};
