// The loops of group-wise quantisation and of signs with error feedback, once per instruction set; included by kernels.inl.
//
// The formats are those of deepspeed/kernels/reference, which these equal bit for bit: fp32, one rounding per operation.
// Magnitudes are compared as integers, which vectorises without -ffast-math and puts NaN above infinity; a sum with
// 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits.

static constexpr uint32_t kInfinityBits = 0x7f800000;
static constexpr float kRounder = 12582912.0f;

static uint32_t magnitude(const float* __restrict x, size_t n) {
    uint32_t largest = 0;
    for (size_t i = 0; i < n; ++i) {
        const uint32_t bits = bits_of(x[i]) & 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

// Floats as integers of the same order: what is below zero is mirrored.
static inline int32_t ordered(float x) {
    const int32_t bits = static_cast<int32_t>(bits_of(x));
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

static void range(const float* __restrict x, size_t n, float* lowest, float* highest) {
    int32_t low = ordered(*lowest), high = ordered(*highest);
    for (size_t i = 0; i < n; ++i) {
        const int32_t value = ordered(x[i]);
        low = value < low ? value : low;
        high = value > high ? value : high;
    }
    *lowest = float_of(static_cast<uint32_t>(low ^ ((low >> 31) & 0x7fffffff)));
    *highest = float_of(static_cast<uint32_t>(high ^ ((high >> 31) & 0x7fffffff)));
}

// round((x - low) / scale), plus `offset`, in the low bits of the result. The quotient is within +-255.
static inline uint32_t to_grid(float x, float low, float scale, int offset) {
    return bits_of((x - low) / scale + kRounder) + static_cast<uint32_t>(offset);
}

static void to_bytes(const float* __restrict x, uint8_t* __restrict q, size_t n, float low, float scale, int offset) {
    DS_INDEPENDENT
    for (size_t i = 0; i < n; ++i) q[i] = static_cast<uint8_t>(to_grid(x[i], low, scale, offset));
}

// Two elements a byte, the even one in the low four bits; n is even.
static void to_nibbles(const float* __restrict x, uint8_t* __restrict q, size_t n, float low, float scale, int offset) {
    alignas(64) uint8_t whole[kBlock];
    to_bytes(x, whole, n, low, scale, offset);
    for (size_t i = 0; i < n / 2; ++i) {
        uint16_t pair;
        std::memcpy(&pair, whole + 2 * i, sizeof pair);
        q[i] = static_cast<uint8_t>((pair & 0xf) | (pair >> 4));
    }
}

template <class Byte>
static void from_bytes(const uint8_t* __restrict q, float* __restrict x, size_t n, float low, float scale) {
    DS_INDEPENDENT
    for (size_t i = 0; i < n; ++i) x[i] = static_cast<float>(static_cast<Byte>(q[i])) * scale + low;
}

static void from_nibbles(const uint8_t* __restrict q, float* __restrict x, size_t n, float low, float scale, int offset) {
    for (size_t i = 0; i < n / 2; ++i) {
        x[2 * i] = static_cast<float>((q[i] & 15) - offset) * scale + low;
        x[2 * i + 1] = static_cast<float>((q[i] >> 4) - offset) * scale + low;
    }
}

// error += x, and the squares of the new error, in kNumLanes lanes.
static void add_and_square(const float* __restrict x, float* __restrict error, size_t n, double* __restrict sums) {
    for (size_t i = 0; i < n; ++i) error[i] += x[i];
    add_squares(error, n, sums);
}

// The signs of 8 elements a byte, the first in the lowest bit, 1 for >= 0; what they do not say stays in `error`. n is a
// multiple of 8.
static void take_signs(float* __restrict error, uint8_t* __restrict bits, size_t n, float scale) {
    for (size_t i = 0; i < n; i += 8) {
        uint32_t packed = 0;
        for (size_t j = 0; j < 8; ++j) packed |= static_cast<uint32_t>(error[i + j] >= 0) << j;
        bits[i / 8] = static_cast<uint8_t>(packed);
    }
    for (size_t i = 0; i < n; ++i) error[i] -= error[i] >= 0 ? scale : -scale;
}

// into += scale * sign, for the signs of `take_signs`.
static void add_signs(const uint8_t* __restrict bits, float* __restrict into, size_t n, float scale) {
    const uint32_t magnitude_bits = bits_of(scale);
    for (size_t i = 0; i < n; i += 8) {
        const uint32_t packed = bits[i / 8];
        for (uint32_t j = 0; j < 8; ++j) into[i + j] += float_of(magnitude_bits ^ (~packed >> j & 1) << 31);
    }
}
