// One expert after the other: y = W2 (silu(gate) * value), (gate, value) = W1 x, and the gradients, once per instruction set; included
// by kernels.inl. BLAS libraries lay both operands out anew for every product; an expert's few rows do not pay for that. Here a
// block of tokens lies in panels, kPanel tokens side by side, [features][kPanel]: the tokens of a product are read as vectors, the
// weights element by element from where they are, each row once; and what a product gives is a panel again, which the next
// one reads. Weights' gradients are written where they belong, from panels of features.
//
// A product's sums go over kDepth features at a time, in order: an element depends on nothing but its operands.

constexpr size_t kPanel = 2 * kWidth;
constexpr size_t kDepth = 256;   // features of a panel that are in the first-level cache
constexpr size_t kBlockRows = 192;  // tokens that are worked on together, in the second-level cache
#ifdef DS_HAS_AVX512
constexpr int kTileHeight = 12;  // rows of a tile: as many as registers hold sums of
#else
constexpr int kTileHeight = 6;
#endif

static inline __attribute__((always_inline)) void fill(Floats& to, float x) {
#if defined(DS_HAS_AVX512)
    to = (Floats)_mm512_set1_ps(x);
#elif defined(DS_HAS_AVX2)
    to = (Floats)_mm256_set1_ps(x);
#else
    to = Floats{x, x, x, x, x, x, x, x};
#endif
}

static inline __attribute__((always_inline)) void add_product(Floats& sum, const Floats& a, const Floats& b) {
#if defined(DS_HAS_AVX512)
    sum = (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(DS_HAS_AVX2)
    sum = (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
    sum += a * b;
#endif
}

// Where a tile's left operand is: rows of a matrix, a copy with its rows side by side, or rows of panels.
enum class Left { kMatrix, kCopy, kPanels };

// c [Rows, Wide vectors] (+)= left [Rows, n] times b [n, kPanel], of which Wide vectors are read.
template <int Rows, int Wide, Left left>
static inline __attribute__((always_inline)) void tile(const float* a, size_t stride, size_t next, const float* b, size_t n,
                                                       float* c, size_t c_stride, bool adds) {
    constexpr size_t step = left == Left::kCopy ? Rows : 1;
    const size_t row = left == Left::kMatrix ? stride : left == Left::kCopy ? 1 : kPanel;
    Floats sums[Rows][Wide] = {};
    while (n) {
        const size_t here = n < kPanel ? n : kPanel;
        if (left == Left::kMatrix)
#pragma GCC unroll 12
            for (int r = 0; r < Rows; ++r) __builtin_prefetch(a + (Rows + r) * row);
        for (size_t k = 0; k < here; ++k) {
            Floats right[Wide];
#pragma GCC unroll 2
            for (int v = 0; v < Wide; ++v) right[v] = *reinterpret_cast<const Floats*>(b + k * kPanel + v * kWidth);
#pragma GCC unroll 12
            for (int r = 0; r < Rows; ++r) {
                Floats one;
                fill(one, a[r * row + k * step]);
#pragma GCC unroll 2
                for (int v = 0; v < Wide; ++v) add_product(sums[r][v], one, right[v]);
            }
        }
        a += left == Left::kPanels ? next : here * step;
        b += here * kPanel;
        n -= here;
    }
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < Wide; ++v) {
            Floats* to = reinterpret_cast<Floats*>(c + r * c_stride + v * kWidth);
            *to = adds ? *to + sums[r][v] : sums[r][v];
        }
}

template <int Rows, Left left>
static void tiles(const float* a, size_t stride, size_t next, const float* b, size_t b_next, size_t n, float* c, size_t c_stride,
                  size_t c_next, size_t columns, bool adds) {
    for (; columns; b += b_next, c += c_next) {
        const size_t here = columns < kPanel ? columns : kPanel;
        (here > kWidth ? tile<Rows, 2, left> : tile<Rows, 1, left>)(a, stride, next, b, n, c, c_stride, adds);
        columns -= here;
    }
}

template <Left left, class... Rest>
static void tiles_of(int rows, Rest... rest) {
    (rows == kTileHeight ? tiles<kTileHeight, left> : rows == kTileHeight / 3 ? tiles<kTileHeight / 3, left> : tiles<kTileHeight / 3 * 2, left>)(rest...);
}

// How many rows the next tile has; `left` of them are a multiple of 16.
static inline int tile_rows(size_t left) { return left < static_cast<size_t>(kTileHeight) ? static_cast<int>(left) : kTileHeight; }

// Panels [rows][kPanel] = weight [rows, depth] times panels [depth][kPanel] of `count` tokens.
static void times(const float* weight, size_t rows, size_t depth, const float* from, size_t count, float* to) {
    for (size_t d = 0; d < depth; d += kDepth) {
        const size_t here = depth - d < kDepth ? depth - d : kDepth;
        for (size_t r = 0; r < rows; r += kTileHeight)
            tiles_of<Left::kMatrix>(tile_rows(rows - r), weight + r * depth + d, depth, size_t{0}, from + d * kPanel, depth * kPanel, here,
                                    to + r * kPanel, kPanel, rows * kPanel, count, d > 0);
    }
}

template <int Rows>
static void copy_columns(const float* from, size_t stride, size_t n, float* to) {
    for (size_t k = 0; k < n; ++k) {
        __builtin_prefetch(from + k * stride + 32);
        std::memcpy(to + k * Rows, from + k * stride, Rows * sizeof(float));
    }
}

// The same with weight [depth, rows] transposed.
static void times_transposed(const float* weight, size_t rows, size_t depth, const float* from, size_t count, float* to) {
    float copy[kDepth * kTileHeight];
    for (size_t d = 0; d < depth; d += kDepth) {
        const size_t here = depth - d < kDepth ? depth - d : kDepth;
        for (size_t r = 0; r < rows; r += kTileHeight) {
            const int wide = tile_rows(rows - r);
            (wide == kTileHeight       ? copy_columns<kTileHeight>
             : wide == kTileHeight / 3 ? copy_columns<kTileHeight / 3>
                                 : copy_columns<kTileHeight / 3 * 2>)(weight + d * rows + r, rows, here, copy);
            tiles_of<Left::kCopy>(wide, static_cast<const float*>(copy), size_t{0}, size_t{0}, from + d * kPanel, depth * kPanel, here,
                                  to + r * kPanel, kPanel, rows * kPanel, count, d > 0);
        }
    }
}

// into [rows, columns] (+)= the sum over tokens of panels [rows][kPanel] and features [columns / kPanel][count][kPanel].
static void products_into(const float* from, size_t rows, const float* features, size_t columns, size_t count, float* into, bool adds) {
    for (size_t r = 0; r < rows; r += kTileHeight)
        tiles_of<Left::kPanels>(tile_rows(rows - r), from + r * kPanel, size_t{0}, rows * kPanel, features, count * kPanel, count,
                                into + r * columns, columns, kPanel, columns, adds);
}

// 8 x 8 elements of rows, to columns.
static inline __attribute__((always_inline)) void turn(const float* const* rows, size_t at, Floats8* to) {
    Floats8 a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        const Floats8 x = *reinterpret_cast<const Floats8*>(rows[i] + at), y = *reinterpret_cast<const Floats8*>(rows[i + 1] + at);
        a[i] = DS_SHUFFLE(x, y, 0, 8, 1, 9, 4, 12, 5, 13);
        a[i + 1] = DS_SHUFFLE(x, y, 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            b[i + 2 * j] = DS_SHUFFLE(a[i + j], a[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            b[i + 2 * j + 1] = DS_SHUFFLE(a[i + j], a[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int i = 0; i < 4; ++i) {
        to[i] = DS_SHUFFLE(b[i], b[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        to[i + 4] = DS_SHUFFLE(b[i], b[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

static inline size_t padded(size_t count) { return (count + kPanel - 1) / kPanel * kPanel; }

// Rows `at` of values [., width] as panels [width][kPanel], zeros behind the last.
static void to_panels(const float* values, const int64_t* at, size_t count, size_t width, const float* zeros, float* to) {
    for (size_t t = 0; t < padded(count); t += 8) {
        const float* rows[8];
        for (size_t i = 0; i < 8; ++i) rows[i] = t + i < count ? values + at[t + i] * width : zeros;
        float* panel = to + t / kPanel * width * kPanel + t % kPanel;
        for (size_t c = 0; c < width; c += 8) {
            Floats8 turned[8];
            turn(rows, c, turned);
            for (int i = 0; i < 8; ++i) *reinterpret_cast<Floats8*>(panel + (c + i) * kPanel) = turned[i];
        }
    }
}

// Rows `at` of values [., width] as features [width / kPanel][count][kPanel].
static void to_features(const float* values, const int64_t* at, size_t count, size_t width, float* to) {
    for (size_t t = 0; t < count; ++t)
        for (size_t c = 0; c < width; c += kPanel)
            std::memcpy(to + (c * count + t * kPanel), values + at[t] * width + c, (width - c < kPanel ? width - c : kPanel) * sizeof(float));
}

// The rows of panels [width][kPanel], 8 tokens and features at a time: use(token, feature, values).
template <class Use>
static inline __attribute__((always_inline)) void from_panels(const float* panels, size_t count, size_t width, Use use) {
    for (size_t t = 0; t < count; t += 8)
        for (size_t c = 0; c < width; c += 8) {
            const float* rows[8];
            for (size_t i = 0; i < 8; ++i) rows[i] = panels + (t / kPanel * width + c + i) * kPanel + t % kPanel;
            Floats8 turned[8];
            turn(rows, 0, turned);
            for (size_t i = 0; i < 8 && t + i < count; ++i) use(t + i, c, turned[i]);
        }
}

// Adds panels' rows, times a factor each or 1, to rows `at` of values.
static void add_rows(const float* panels, size_t count, size_t width, const int64_t* at, const float* factors, float* values) {
    from_panels(panels, count, width, [=](size_t t, size_t c, const Floats8& row) __attribute__((always_inline)) {
        Floats8* to = reinterpret_cast<Floats8*>(values + at[t] * width + c);
        *to += factors ? row * factors[t] : row;
    });
}

// 1 / (1 + e^-x) from e^-|x|, whose error does not grow.
static inline __attribute__((always_inline)) void sigmoid(const Floats& x, Floats& to) {
    float e[kWidth];
    *reinterpret_cast<Floats*>(e) = (Floats)((Words)x | 0x80000000u);
    exponentials(e, kWidth, 0);
    const Floats small = *reinterpret_cast<Floats*>(e);
    const Ints is_below = x < 0.0f;
    fill(to, 1.0f);
    to = (Floats)(((Ints)small & is_below) | ((Ints)to & ~is_below)) / (small + 1.0f);
}

// inside [inner][kPanel] = silu(gate) * value of panels before [2 inner][kPanel].
static void activate(const float* before, size_t count, size_t inner, float* inside) {
    for (size_t t = 0; t < count; t += kWidth) {
        const size_t panel = t / kPanel * inner * kPanel, column = t % kPanel;
        const float* gates = before + 2 * panel + column;
        for (size_t i = 0; i < inner * kPanel; i += kPanel) {
            const Floats gate = *reinterpret_cast<const Floats*>(gates + i);
            const Floats value = *reinterpret_cast<const Floats*>(gates + inner * kPanel + i);
            Floats share;
            sigmoid(gate, share);
            *reinterpret_cast<Floats*>(inside + panel + column + i) = gate * share * value;
        }
    }
}

// From gradients [inner][kPanel] of unweighed results: those of `before` and of the factors; weighed insides take their place.
static void activate_backward(const float* before, const float* factors, size_t count, size_t inner, float* gradients, float* of_before,
                              float* of_factors) {
    for (size_t t = 0; t < count; t += kWidth) {
        const size_t panel = t / kPanel * inner * kPanel, column = t % kPanel, numel = count - t < kWidth ? count - t : kWidth;
        const size_t gates = 2 * panel + column, values = gates + inner * kPanel;
        float factor[kWidth] = {}, total[kWidth];
        std::memcpy(factor, factors + t, numel * sizeof(float));
        const Floats scale = *reinterpret_cast<Floats*>(factor);
        Floats sum = {};
        for (size_t i = 0; i < inner * kPanel; i += kPanel) {
            Floats* const at = reinterpret_cast<Floats*>(gradients + panel + column + i);
            const Floats gate = *reinterpret_cast<const Floats*>(before + gates + i);
            const Floats value = *reinterpret_cast<const Floats*>(before + values + i);
            Floats share;
            sigmoid(gate, share);
            const Floats opened = gate * share, inside = opened * value, weighed = *at * scale;
            sum += *at * inside;
            *reinterpret_cast<Floats*>(of_before + gates + i) = weighed * value * (share * (gate * (1.0f - share) + 1.0f));
            *reinterpret_cast<Floats*>(of_before + values + i) = weighed * opened;
            *at = inside * scale;
        }
        *reinterpret_cast<Floats*>(total) = sum;
        std::memcpy(of_factors + t, total, numel * sizeof(float));
    }
}

// How many tokens the next block has: blocks of about the same number, whole panels but for the last.
static inline size_t block_of(size_t left) {
    const size_t blocks = (left + kBlockRows - 1) / kBlockRows, even = padded((left + blocks - 1) / blocks);
    return even < left ? even : left;
}

// Floats that the functions below work with.
static size_t experts_scratch(size_t width, size_t inner) {
    return padded(kBlockRows) * (width + 3 * inner + padded(width > inner ? width : inner)) + width;
}

// See kernels.h.
static void expert_forward(const ExpertCall& call, const float* up, const float* down, const int64_t* at, const float* factors, size_t count,
                           float* before, float* scratch) {
    const size_t width = call.width, inner = call.inner, most = padded(kBlockRows);
    float *const panels = scratch, *const inside = panels + most * width, *const zeros = inside + most * inner;
    std::memset(zeros, 0, width * sizeof(float));
    for (size_t here; count; count -= here, at += here, factors += here, before += padded(here) * 2 * inner) {
        here = block_of(count);
        to_panels(call.tokens, at, here, width, zeros, panels);
        times(up, 2 * inner, width, panels, here, before);
        activate(before, here, inner, inside);
        times(down, width, inner, inside, here, panels);
        add_rows(panels, here, width, at, factors, call.out);
    }
}

static void expert_backward(const ExpertCall& call, const float* up, const float* down, const int64_t* at, const float* factors, size_t count,
                            const float* before, float* of_factors, float* of_up, float* of_down, float* scratch) {
    const size_t width = call.width, inner = call.inner, most = padded(kBlockRows);
    float *const panels = scratch, *const inside = panels + most * width, *const of_before = inside + most * inner;
    float *const features = of_before + most * 2 * inner, *const zeros = features + most * padded(width > inner ? width : inner);
    std::memset(zeros, 0, width * sizeof(float));
    bool adds = false;
    for (size_t here; count; count -= here, at += here, factors += here, of_factors += here, before += padded(here) * 2 * inner) {
        here = block_of(count);
        to_panels(call.gradient, at, here, width, zeros, panels);
        times_transposed(down, inner, width, panels, here, inside);
        activate_backward(before, factors, here, inner, inside, of_before, of_factors);
        if (of_down) {
            from_panels(inside, here, inner, [=](size_t t, size_t c, const Floats8& row) __attribute__((always_inline)) {
                *reinterpret_cast<Floats8*>(features + c / kPanel * here * kPanel + t * kPanel + c % kPanel) = row;
            });
            products_into(panels, width, features, inner, here, of_down, adds);
        }
        if (of_up) {
            to_features(call.tokens, at, here, width, features);
            products_into(of_before, 2 * inner, features, width, here, of_up, adds);
        }
        if (call.of_tokens) {
            times_transposed(up, width, 2 * inner, of_before, here, panels);
            add_rows(panels, here, width, at, nullptr, call.of_tokens);
        }
        adds = true;
    }
}
