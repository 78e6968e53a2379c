// The pairs of one EGCL, forward and backward, fused: no tensor of all pairs leaves the caches but what backward needs.
//
//   a = t_i + s_j + Σ_k c_k q_k(i, j)      q: d² and K functions of d; the same of a second distance, if there is one;
//                                          what is given of the pair besides (its context), if there is something
//   v = W2 silu(a) + b2,  u = silu(v),  e = sigmoid(w·u + β),  m = e u            (eq. 4)
//   p = W3 m + b3,  φ = w4·silu(p)  (bounded: b tanh φ)                           (eq. 5, 9)
//   out: Σ_j m  and  Σ_j φ (x_i − x_j) / (‖x_i − x_j‖ + 1)
//
// and, for exact traces, the product of many tangents with the Jacobians of all pairs (push).
//
// Plain C++17 with the vector types of GCC and Clang; no header but the standard library's. Every function works on the
// molecules [first, last) of a batch, so that threads share nothing but what they read; gradients of the weights are
// added to buffers of the caller's, one set a thread.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64, TILE_VECTORS = 4;
#elif defined(__AVX__)
constexpr int BYTES = 32, TILE_VECTORS = 2;
#else
constexpr int BYTES = 16, TILE_VECTORS = 4;
#endif
constexpr int TILE_ROWS = 6;   // of C held in registers, TILE_VECTORS each
constexpr int CHUNK = 96;      // pairs at a time
constexpr int MAX_DIMENSION = 3;
constexpr double EPSILON = 1e-8;  // DISTANCE_EPSILON of egnn.py

template <typename T>
struct Vector {
    static constexpr int LANES = BYTES / sizeof(T);
    typedef T type __attribute__((vector_size(BYTES)));
    typedef T loose __attribute__((vector_size(BYTES), aligned(alignof(T)), may_alias));  // at any address of a T
};
template <typename T> using vec = typename Vector<T>::type;

template <typename T> inline vec<T> load(const T* from) { return *reinterpret_cast<const typename Vector<T>::loose*>(from); }
template <typename T> inline void store(T* to, vec<T> v) { *reinterpret_cast<typename Vector<T>::loose*>(to) = v; }
template <typename T> inline vec<T> splat(T value) { return value - vec<T>{}; }
template <typename T> inline T sum(vec<T> v) {
    T total = 0;
    for (int k = 0; k < Vector<T>::LANES; ++k) total += v[k];
    return total;
}

// e^x to about two units in the last place; arguments are clamped to where neither it nor 1 + it overflows.
inline vec<float> exponential(vec<float> x) {
    typedef int32_t ivec __attribute__((vector_size(BYTES)));
    const vec<float> low = splat(-87.0f), high = splat(87.0f);
    x = x < low ? low : x;
    x = x > high ? high : x;
    const vec<float> shifter = splat(12582912.0f);  // 1.5 · 2^23 rounds to an integer in the low bits
    const vec<float> biased = x * 1.44269504088896341f + shifter;
    const vec<float> n = biased - shifter;
    vec<float> r = x - n * 0.693145751953125f;  // ln 2 in two parts
    r = r - n * 1.42860682030941723e-6f;
    vec<float> p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + (r + 1.0f);
    const ivec scale = ((ivec)biased - (int32_t)0x4B400000 + 127) << 23;
    return p * (vec<float>)scale;
}

inline vec<double> exponential(vec<double> x) {
    for (int k = 0; k < Vector<double>::LANES; ++k) x[k] = std::exp(x[k] < -700 ? -700 : x[k] > 700 ? 700 : x[k]);
    return x;
}

template <typename T> inline vec<T> sigmoid(vec<T> x) { return T(1) / (T(1) + exponential(-x)); }

// One register tile of C = A B (+ C's start): A has the strides given, B is (depth, ·) with rows `ldb` apart.
template <typename T, int ROWS, int VECTORS>
inline void tile(const T* a, long row_stride, long step, const T* b, long ldb, int depth, T* c, long ldc, const T* bias,
                 bool add) {
    constexpr int LANES = Vector<T>::LANES;
    vec<T> sums[ROWS][VECTORS];
    for (int r = 0; r < ROWS; ++r)
        for (int k = 0; k < VECTORS; ++k)
            sums[r][k] = add ? load(c + r * ldc + k * LANES) : bias ? load(bias + k * LANES) : vec<T>{};
    for (int d = 0; d < depth; ++d) {
        vec<T> row[VECTORS];
        for (int k = 0; k < VECTORS; ++k) row[k] = load(b + d * ldb + k * LANES);
        for (int r = 0; r < ROWS; ++r) {
            const T factor = a[r * row_stride + d * step];
            for (int k = 0; k < VECTORS; ++k) sums[r][k] += factor * row[k];
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int k = 0; k < VECTORS; ++k) store(c + r * ldc + k * LANES, sums[r][k]);
}

template <typename T, int VECTORS>
void rows_of(int rows, const T* a, long row_stride, long step, const T* b, long ldb, int depth, T* c, long ldc,
             const T* bias, bool add) {
    int r = 0;
    for (; r + TILE_ROWS <= rows; r += TILE_ROWS)
        tile<T, TILE_ROWS, VECTORS>(a + r * row_stride, row_stride, step, b, ldb, depth, c + r * ldc, ldc, bias, add);
    for (; r + 2 <= rows; r += 2)
        tile<T, 2, VECTORS>(a + r * row_stride, row_stride, step, b, ldb, depth, c + r * ldc, ldc, bias, add);
    if (r < rows)
        tile<T, 1, VECTORS>(a + r * row_stride, row_stride, step, b, ldb, depth, c + r * ldc, ldc, bias, add);
}

// C (rows, width) = A B + bias, or C += A B; A's element (r, d) is a[r row_stride + d step], B is (depth, width) dense.
template <typename T>
void multiply(int rows, int width, int depth, const T* a, long row_stride, long step, const T* b, T* c, const T* bias,
              bool add) {
    constexpr int LANES = Vector<T>::LANES;
    int column = 0;
    for (; column + TILE_VECTORS * LANES <= width; column += TILE_VECTORS * LANES)
        rows_of<T, TILE_VECTORS>(rows, a, row_stride, step, b + column, width, depth, c + column, width,
                                 bias ? bias + column : nullptr, add);
    for (; column < width; column += LANES)
        rows_of<T, 1>(rows, a, row_stride, step, b + column, width, depth, c + column, width,
                      bias ? bias + column : nullptr, add);
}

template <typename T>
struct Problem {
    int atoms, dimension, width, radial, scalars, given;  // M, n, F, K, rows of by_scalar, A of them of the context
    double bound;                                  // of φ; not positive for none
    const uint8_t* mask;                                 // (B, M, M)
    const T* context;                                    // (B, M, M, A) or null
    const T *target, *source, *x, *extra;                // (B, M, F) twice, (B, M, n), (B, M, M) or null
    const T *by_scalar;                                  // (scalars, F)
    const T *w2, *b2, *gate, *gate_bias, *w3, *b3, *w4;  // gate or w3 null where the layer has none
};

template <typename T>
struct Pairs {  // a chunk of pairs of one molecule
    int count = 0;
    int i[CHUNK], j[CHUNK];
    T squared[CHUNK], extra[CHUNK], r[CHUNK][MAX_DIMENSION];
    const T* context[CHUNK];
};

// The scalars of a chunk, (pairs, stride) with zeros from `scalars` on, and their derivatives by the squared distance.
template <typename T>
struct Scalars {
    int stride;
    std::vector<T> value, slope;

    explicit Scalars(const Problem<T>& problem) {
        constexpr int LANES = Vector<T>::LANES;
        stride = (problem.scalars + LANES - 1) / LANES * LANES;
        value.assign((size_t)CHUNK * stride, T(0));
        slope.assign((size_t)CHUNK * stride, T(0));
    }

    void fill(const Problem<T>& problem, const Pairs<T>& pairs) {
        for (int k = 0; k < pairs.count; ++k) {
            expand(pairs.squared[k], problem.radial, k * stride);
            if (problem.extra) expand(pairs.extra[k], problem.radial, k * stride + 1 + problem.radial);
            const int at = k * stride + problem.scalars - problem.given;  // where the slope stays zero: it is constant
            for (int g = 0; g < problem.given; ++g) value[at + g] = pairs.context[k][g];
        }
    }

    // d² and b_k = exp(−β (e^−d − μ_k)²), μ_k = k / (K − 1), β = (2 K / 3)².
    void expand(T squared, int radial, int at) {
        constexpr int LANES = Vector<T>::LANES;
        value[at] = squared, slope[at] = 1;
        if (!radial) return;
        const T distance = std::sqrt(squared + T(EPSILON)), decay = std::exp(-distance);
        const T root = T(2 * radial) / 3, spacing = radial > 1 ? T(1) / (radial - 1) : T(0);
        for (int start = 0; start < radial; start += LANES) {
            vec<T> off;
            for (int k = 0; k < LANES; ++k) off[k] = decay - (start + k) * spacing;
            const vec<T> scaled = root * off, b = exponential(-scaled * scaled);
            const vec<T> by_squared = (root * decay / distance) * scaled * b;
            const int some = radial - start < LANES ? radial - start : LANES;
            std::memcpy(&value[at + 1 + start], &b, some * sizeof(T));
            std::memcpy(&slope[at + 1 + start], &by_squared, some * sizeof(T));
        }
    }
};

// Calls work(pairs, index of the first pair in the molecule) for the pairs of a molecule, a chunk at a time.
template <typename T, typename Work>
void each_chunk(const Problem<T>& problem, int molecule, Work work) {
    const int atoms = problem.atoms, n = problem.dimension;
    const uint8_t* mask = problem.mask + (long)molecule * atoms * atoms;
    const T* x = problem.x + (long)molecule * atoms * n;
    const T* extra = problem.extra ? problem.extra + (long)molecule * atoms * atoms : nullptr;
    Pairs<T> pairs;
    long done = 0;
    for (int i = 0; i < atoms; ++i)
        for (int j = 0; j < atoms; ++j) {
            if (!mask[i * atoms + j]) continue;
            const int k = pairs.count++;
            pairs.i[k] = i, pairs.j[k] = j;
            pairs.squared[k] = 0;
            for (int c = 0; c < n; ++c) {
                pairs.r[k][c] = x[i * n + c] - x[j * n + c];
                pairs.squared[k] += pairs.r[k][c] * pairs.r[k][c];
            }
            pairs.extra[k] = extra ? extra[i * atoms + j] : T(0);
            pairs.context[k] = problem.context + (((long)molecule * atoms + i) * atoms + j) * problem.given;
            if (pairs.count == CHUNK) {
                work(pairs, done);
                done += CHUNK, pairs.count = 0;
            }
        }
    if (pairs.count) work(pairs, done);
}

// a of the first SiLU, (pairs, F).
template <typename T>
void preactivations(const Problem<T>& problem, const T* target, const T* source, const Pairs<T>& pairs,
                    const Scalars<T>& scalars, T* a) {
    constexpr int LANES = Vector<T>::LANES;
    const int width = problem.width;
    for (int k = 0; k < pairs.count; ++k) {
        const T *to = target + (long)pairs.i[k] * width, *from = source + (long)pairs.j[k] * width;
        for (int f = 0; f < width; f += LANES) store(a + k * width + f, load(to + f) + load(from + f));
    }
    multiply<T>(pairs.count, width, problem.scalars, scalars.value.data(), scalars.stride, 1, problem.by_scalar, a,
                nullptr, true);
}

// What backward needs of a pair besides v and p: its soft edge e and φ.
template <typename T>
struct Kept {
    T edge, phi;
};

template <typename T>
void transpose(const T* from, T* to, int width) {
    for (int r = 0; r < width; ++r)
        for (int c = 0; c < width; ++c) to[c * width + r] = from[r * width + c];
}

template <typename T>
void forward(const Problem<T>& problem, int first, int last, T* messages, T* shift, T* keep_v, T* keep_p,
             Kept<T>* keep) {
    constexpr int LANES = Vector<T>::LANES;
    const int width = problem.width, atoms = problem.atoms, n = problem.dimension;
    std::vector<T> memory((size_t)(3 * CHUNK + 2 * width) * width);
    T *s = memory.data(), *v_own = s + CHUNK * width, *p_own = v_own + CHUNK * width, *w2 = p_own + CHUNK * width,
      *w3 = w2 + width * width;
    transpose(problem.w2, w2, width);
    if (problem.w3) transpose(problem.w3, w3, width);
    Scalars<T> scalars(problem);
    for (int molecule = first; molecule < last; ++molecule) {
        const long node = (long)molecule * atoms;
        const T *target = problem.target + node * width, *source = problem.source + node * width;
        T *m_sum = messages + node * width, *x_sum = shift ? shift + node * n : nullptr;
        const long kept = node * atoms;
        each_chunk<T>(problem, molecule, [&](const Pairs<T>& pairs, long start) {
            T* v = keep_v ? keep_v + (kept + start) * width : v_own;
            T* p = keep_p ? keep_p + (kept + start) * width : p_own;
            scalars.fill(problem, pairs);
            preactivations(problem, target, source, pairs, scalars, s);
            for (int f = 0; f < pairs.count * width; f += LANES) {
                const vec<T> a = load(s + f);
                store(s + f, a * sigmoid<T>(a));
            }
            multiply<T>(pairs.count, width, width, s, width, 1, w2, v, problem.b2, false);
            for (int k = 0; k < pairs.count; ++k) {
                T* m = s + k * width;
                vec<T> dot{};
                for (int f = 0; f < width; f += LANES) {
                    const vec<T> y = load(v + k * width + f);
                    const vec<T> u = y * sigmoid<T>(y);
                    store(m + f, u);
                    if (problem.gate) dot += u * load(problem.gate + f);
                }
                const T e = problem.gate ? 1 / (1 + std::exp(-(sum<T>(dot) + *problem.gate_bias))) : T(1);
                if (keep) keep[kept + start + k].edge = e;
                T* to = m_sum + (long)pairs.i[k] * width;
                for (int f = 0; f < width; f += LANES) {
                    const vec<T> gated = e * load(m + f);
                    store(m + f, gated);
                    store(to + f, load(to + f) + gated);
                }
            }
            if (!problem.w3) return;
            multiply<T>(pairs.count, width, width, s, width, 1, w3, p, problem.b3, false);
            for (int k = 0; k < pairs.count; ++k) {
                vec<T> dot{};
                for (int f = 0; f < width; f += LANES) {
                    const vec<T> y = load(p + k * width + f);
                    dot += y * sigmoid<T>(y) * load(problem.w4 + f);
                }
                const T bound = T(problem.bound), total = sum<T>(dot);
                const T phi = bound > 0 ? bound * std::tanh(total) : total;
                if (keep) keep[kept + start + k].phi = phi;
                const T weight = phi / (std::sqrt(pairs.squared[k] + T(EPSILON)) + 1);
                for (int c = 0; c < n; ++c) x_sum[pairs.i[k] * n + c] += weight * pairs.r[k][c];
            }
        });
    }
}

template <typename T>
struct Gradients {
    T *target, *source, *x, *extra;                            // as the inputs; extra may be null
    T *by_scalar, *w2, *b2, *gate, *gate_bias, *w3, *b3, *w4;  // as the weights, of this thread alone; null for none
};

template <typename T, bool WEIGHTS>
void backward(const Problem<T>& problem, int first, int last, const T* keep_v, const T* keep_p,
              const Kept<T>* keep, const T* g_messages, const T* g_shift, const Gradients<T>& g) {
    constexpr int LANES = Vector<T>::LANES;
    const int width = problem.width, atoms = problem.atoms, n = problem.dimension;
    std::vector<T> memory((size_t)5 * CHUNK * width);
    T *m = memory.data(), *gm = m + CHUNK * width, *gp = gm + CHUNK * width, *s = gp + CHUNK * width,
      *slope = s + CHUNK * width;
    Scalars<T> scalars(problem);
    const int stride = scalars.stride;
    std::vector<T> by_scalar((size_t)width * stride), g_scalar((size_t)CHUNK * stride);  // transposed, padded
    for (int k = 0; k < problem.scalars; ++k)
        for (int f = 0; f < width; ++f) by_scalar[(size_t)f * stride + k] = problem.by_scalar[(size_t)k * width + f];
    for (int molecule = first; molecule < last; ++molecule) {
        const long node = (long)molecule * atoms;
        const T *target = problem.target + node * width, *source = problem.source + node * width;
        const T *gm_sum = g_messages + node * width, *gx_sum = g_shift ? g_shift + node * n : nullptr;
        T *gt = g.target + node * width, *gs = g.source + node * width, *gx = g.x + node * n;
        const long all = node * atoms;
        each_chunk<T>(problem, molecule, [&](const Pairs<T>& pairs, long start) {
            const T *v = keep_v + (all + start) * width, *p = keep_p ? keep_p + (all + start) * width : nullptr;
            const Kept<T>* kept = keep + all + start;
            T g_squared[CHUNK] = {}, g_r[CHUNK][MAX_DIMENSION] = {};
            for (int k = 0; k < pairs.count; ++k) {  // m again, and what arrives at it from the sum
                const T *vk = v + k * width, *got = gm_sum + (long)pairs.i[k] * width;
                const T e = kept[k].edge;
                for (int f = 0; f < width; f += LANES) {
                    const vec<T> y = load(vk + f), open = sigmoid<T>(y), value = y * open;
                    store(m + k * width + f, e * value);
                    store(slope + k * width + f, open * (T(1) - value) + value);
                    store(gm + k * width + f, load(got + f));
                }
            }
            if (problem.w3) {
                for (int k = 0; k < pairs.count; ++k) {
                    T* gpk = gp + k * width;
                    for (int f = 0; f < width; f += LANES) {
                        const vec<T> y = load(p + k * width + f), w = load(problem.w4 + f);
                        const vec<T> open = sigmoid<T>(y), value = y * open;
                        store(gpk + f, w * (open * (T(1) - value) + value));
                        store(s + k * width + f, value);
                    }
                    const T phi = kept[k].phi, bound = T(problem.bound);
                    T along = 0;
                    const T distance = std::sqrt(pairs.squared[k] + T(EPSILON)), inverse = 1 / (distance + 1);
                    for (int c = 0; c < n; ++c) {
                        const T got = gx_sum[pairs.i[k] * n + c];
                        along += got * pairs.r[k][c];
                        g_r[k][c] = phi * inverse * got;
                    }
                    g_squared[k] = -along * phi * inverse * inverse / (2 * distance);
                    const T g_phi = along * inverse * (bound > 0 ? (bound - phi) * (bound + phi) / bound : T(1));
                    for (int f = 0; f < width; f += LANES) {
                        const vec<T> gpf = g_phi * load(gpk + f);
                        store(gpk + f, gpf);
                        if (!WEIGHTS) continue;
                        store(g.b3 + f, load(g.b3 + f) + gpf);
                        store(g.w4 + f, load(g.w4 + f) + g_phi * load(s + k * width + f));
                    }
                }
                if (WEIGHTS) multiply<T>(width, width, pairs.count, gp, 1, width, m, g.w3, nullptr, true);   // += gpᵀ m
                multiply<T>(pairs.count, width, width, gp, width, 1, problem.w3, gm, nullptr, true);  // += gp W3
            }
            for (int k = 0; k < pairs.count; ++k) {  // through the gate and the second SiLU
                const T e = kept[k].edge;
                T* gmk = gm + k * width;
                T g_gate = 0, per_edge = 0;
                if (problem.gate) {
                    vec<T> dot{};
                    for (int f = 0; f < width; f += LANES) dot += load(gmk + f) * load(m + k * width + f);  // e ge
                    g_gate = sum<T>(dot) * (1 - e);
                    per_edge = e > 0 ? g_gate / e : T(0);  // m is e u, and zero with e
                    if (WEIGHTS) *g.gate_bias += g_gate;
                }
                for (int f = 0; f < width; f += LANES) {
                    vec<T> gu = e * load(gmk + f);
                    if (problem.gate) {
                        gu += g_gate * load(problem.gate + f);
                        if (WEIGHTS) store(g.gate + f, load(g.gate + f) + per_edge * load(m + k * width + f));
                    }
                    const vec<T> gv = gu * load(slope + k * width + f);
                    store(gmk + f, gv);
                    if (WEIGHTS) store(g.b2 + f, load(g.b2 + f) + gv);
                }
            }
            scalars.fill(problem, pairs);
            preactivations(problem, target, source, pairs, scalars, s);
            for (int f = 0; f < pairs.count * width; f += LANES) {
                const vec<T> a = load(s + f), open = sigmoid<T>(a), value = a * open;
                store(s + f, value);
                store(slope + f, open * (T(1) - value) + value);
            }
            if (WEIGHTS) multiply<T>(width, width, pairs.count, gm, 1, width, s, g.w2, nullptr, true);           // += gvᵀ s
            multiply<T>(pairs.count, width, width, gm, width, 1, problem.w2, gp, nullptr, false);   // gs = gv W2
            for (int k = 0; k < pairs.count; ++k) {
                T *to = gt + (long)pairs.i[k] * width, *from = gs + (long)pairs.j[k] * width;
                for (int f = 0; f < width; f += LANES) {
                    const vec<T> ga = load(gp + k * width + f) * load(slope + k * width + f);
                    store(gp + k * width + f, ga);
                    store(to + f, load(to + f) + ga);
                    store(from + f, load(from + f) + ga);
                }
            }
            if (WEIGHTS)  // += qᵀ ga
                multiply<T>(problem.scalars, width, pairs.count, scalars.value.data(), 1, stride, gp, g.by_scalar,
                            nullptr, true);
            multiply<T>(pairs.count, stride, width, gp, width, 1, by_scalar.data(), g_scalar.data(), nullptr, false);
            for (int k = 0; k < pairs.count; ++k) {
                const int i = pairs.i[k], j = pairs.j[k], terms = 1 + problem.radial;
                const T *got = g_scalar.data() + k * stride, *by = scalars.slope.data() + k * stride;
                T total = g_squared[k], other = 0;
                for (int q = 0; q < terms; ++q) total += got[q] * by[q];
                for (int q = terms; q < problem.scalars; ++q) other += got[q] * by[q];
                if (g.extra) g.extra[(node + i) * atoms + j] = other;
                for (int c = 0; c < n; ++c) {
                    const T moved = g_r[k][c] + 2 * total * pairs.r[k][c];
                    gx[i * n + c] += moved;
                    gx[j * n + c] -= moved;
                }
            }
        });
    }
}

// Tangents of a layer's inputs along D directions, pushed through the layer (see jacobian.py for the terms).
template <typename T>
struct Tangents {
    int atoms, dimension, width, directions, columns;  // columns: M n rounded up to whole vectors
    const uint8_t* mask;                       // (B, M, M)
    const T *slope, *alpha, *beta, *u;         // (B, M, M, F): G_ijᵀ[f, g] = slope_f W[g, f] alpha_g + beta_f u_g
    const T* weight;                           // W, (F, F)
    const T* to_m;                             // (B, i, j, n, F): ∂m_i/∂x_j
    const T* to_m0;                            // the same of the input positions, which directions (j, c < n) move
    const T *a_i, *a_j, *by_h, *by_m;          // (F, F)
    const T *node_slope, *node_out;            // (B, M, F), (F, F): h ← h + node_out diag(node_slope) (by_h h + by_m m)
    const T* to_x;                             // (B, j, F + n, columns): what [a_j h_j, x_j] does to all x'
    const T* own_x;                            // (B, i, F, n): what h_i does to its own x'
    const T* x;                                // (B, M, D, n)
    T* h;                                      // (B, M, D, F), updated in place
    T* v;                                      // (B, M, D, F + n), memory for [a_j h_j, x_j]
    T* moved;                                  // (B, j, D, columns): how far atom j moves all x'
};

// First what comes from each of the atoms [first, last) of the batch ...
template <typename T>
void push_sources(const Tangents<T>& t, int first, int last) {
    constexpr int LANES = Vector<T>::LANES;
    const int width = t.width, n = t.dimension, row = width + n, directions = t.directions;
    std::vector<T> a_j((size_t)width * width), product((size_t)directions * width);
    std::vector<T> own((size_t)width * LANES), shift((size_t)directions * LANES);
    transpose(t.a_j, a_j.data(), width);
    for (long atom = first; atom < last; ++atom) {
        const T *h = t.h + atom * directions * width, *x = t.x + atom * directions * n;
        T *v = t.v + atom * directions * row, *moved = t.moved + atom * directions * t.columns;
        multiply<T>(directions, width, width, h, width, 1, a_j.data(), product.data(), nullptr, false);
        for (long d = 0; d < directions; ++d) {
            std::memcpy(v + d * row, product.data() + d * width, width * sizeof(T));
            std::memcpy(v + d * row + width, x + d * n, n * sizeof(T));
        }
        multiply<T>(directions, t.columns, row, v, row, 1, t.to_x + atom * row * t.columns, moved, nullptr, false);
        for (int f = 0; f < width; ++f)
            for (int c = 0; c < n; ++c) own[f * LANES + c] = t.own_x[(atom * width + f) * n + c];
        multiply<T>(directions, LANES, width, h, width, 1, own.data(), shift.data(), nullptr, false);
        for (long d = 0; d < directions; ++d)
            for (int c = 0; c < n; ++c) moved[d * t.columns + atom % t.atoms * n + c] += shift[d * LANES + c];
    }
}

// ... then what arrives at each atom i, whose own h no other atom needs any more.
template <typename T>
void push_targets(const Tangents<T>& t, int first, int last) {
    constexpr int LANES = Vector<T>::LANES;
    const int width = t.width, n = t.dimension, row = width + n, atoms = t.atoms, directions = t.directions;
    const size_t square = (size_t)width * width;
    std::vector<T> block(square + (size_t)n * width), weight(square), all(square), out(square), by_m(square), by_h(square);
    std::vector<T> dm((size_t)directions * width), sum_h((size_t)directions * width);
    transpose(t.weight, weight.data(), width);
    for (long i = first; i < last; ++i) {
        std::fill(dm.begin(), dm.end(), T(0));
        std::fill(all.begin(), all.end(), T(0));  // Σ_j G_ijᵀ
        for (int j = 0; j < atoms; ++j) {
            const long pair = i * atoms + j, at = pair * width, source = i / atoms * atoms + j;
            const T *moved = t.to_m + at * n, *from = t.v + source * directions * row;
            if (t.to_m0)
                for (int c = 0; c < n; ++c) {
                    T* to = dm.data() + ((long)j * (directions / atoms) + c) * width;
                    for (int g = 0; g < width; ++g) to[g] += t.to_m0[at * n + c * width + g];
                }
            if (!t.mask[pair]) {  // the atom itself, or padding: no message, but the distances of all others
                multiply<T>(directions, width, n, from + width, row, 1, moved, dm.data(), nullptr, true);
                continue;
            }
            for (int f = 0; f < width; ++f)
                for (int g = 0; g < width; g += LANES) {
                    const long k = (long)f * width + g;
                    vec<T> entry = t.slope[at + f] * load(weight.data() + k) * load(t.alpha + at + g);
                    if (t.beta) entry += t.beta[at + f] * load(t.u + at + g);
                    store(block.data() + k, entry);
                    store(all.data() + k, load(all.data() + k) + entry);
                }
            std::memcpy(block.data() + square, moved, (size_t)n * width * sizeof(T));
            multiply<T>(directions, width, row, from, row, 1, block.data(), dm.data(), nullptr, true);
        }
        // The node update as two matrices, of dm and of h: h ← dm N + h (1 + by_hᵀ out + a_iᵀ all N), N = by_mᵀ out.
        for (int f = 0; f < width; ++f)
            for (int g = 0; g < width; ++g) out[f * width + g] = t.node_slope[i * width + f] * t.node_out[g * width + f];
        multiply<T>(width, width, width, t.by_m, 1, width, out.data(), by_m.data(), nullptr, false);
        multiply<T>(width, width, width, t.by_h, 1, width, out.data(), by_h.data(), nullptr, false);
        multiply<T>(width, width, width, all.data(), width, 1, by_m.data(), out.data(), nullptr, false);
        multiply<T>(width, width, width, t.a_i, 1, width, out.data(), by_h.data(), nullptr, true);
        for (int f = 0; f < width; ++f) by_h[f * width + f] += 1;
        T* h = t.h + i * directions * width;
        multiply<T>(directions, width, width, dm.data(), width, 1, by_m.data(), sum_h.data(), nullptr, false);
        multiply<T>(directions, width, width, h, width, 1, by_h.data(), sum_h.data(), nullptr, true);
        std::copy(sum_h.begin(), sum_h.end(), h);
    }
}

}  // namespace

#define EXPORT(T, NAME)                                                                                               \
    extern "C" void pairs_forward_##NAME(const Problem<T>* problem, int first, int last, T* messages, T* shift,        \
                                         T* keep_v, T* keep_p, Kept<T>* keep) {                                       \
        forward<T>(*problem, first, last, messages, shift, keep_v, keep_p, keep);                                     \
    }                                                                                                                 \
    extern "C" void pairs_backward_##NAME(const Problem<T>* problem, int first, int last, const T* keep_v,             \
                                          const T* keep_p, const Kept<T>* keep, const T* g_messages,                  \
                                          const T* g_shift, const Gradients<T>* gradients) {                          \
        (gradients->w2 ? backward<T, true> : backward<T, false>)(*problem, first, last, keep_v, keep_p, keep,          \
                                                                 g_messages, g_shift, *gradients);                    \
    }                                                                                                                 \
    extern "C" void pairs_push_sources_##NAME(const Tangents<T>* tangents, int first, int last) {                       \
        push_sources<T>(*tangents, first, last);                                                                      \
    }                                                                                                                 \
    extern "C" void pairs_push_targets_##NAME(const Tangents<T>* tangents, int first, int last) {                       \
        push_targets<T>(*tangents, first, last);                                                                      \
    }

EXPORT(float, float32)
EXPORT(double, float64)
