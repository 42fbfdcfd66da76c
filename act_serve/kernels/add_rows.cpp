// Adds weighted ability rows to a layer's output: see add_rows_reference in reference.py for the formula.
//
// Compiled once per machine by native.py. Every thread owns a range of output columns and finds its rows in each
// ability's ascending list, so no two threads write the same element, whatever rows abilities have in common.
// Products are accumulated in fp32; an output is rounded once per ability.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <omp.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

struct bf16 {
  uint16_t bits;
};

struct Segment {  // one ability's rows of one layer; native.py fills it
  const int32_t* rows;
  const void* delta;
  const void* bias;
  int64_t count;
};

namespace {

constexpr int64_t kBytesWorthAThread = 32 << 10;
constexpr int64_t kProductsWorthAThread = 200'000;

float to_float(float value) { return value; }
float to_float(bf16 value) {
  uint32_t wide = static_cast<uint32_t>(value.bits) << 16;
  float number;
  std::memcpy(&number, &wide, 4);
  return number;
}

void store(float* place, float value) { *place = value; }
void store(bf16* place, float value) {  // to nearest, ties to even, as torch does; NaN stays NaN
  uint32_t wide;
  std::memcpy(&wide, &value, 4);
  place->bits = value == value ? static_cast<uint16_t>((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16) : 0x7FC0;
}

// As many lanes as the machine's registers have: wider vectors would be split through memory.
#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));

// A step of a dot product over `width` elements.
template <class T>
struct Step;

template <>
struct Step<float> {
  static constexpr int width = kLanes;
  using Operand = Floats;
  static Operand load(const float* from) {
    Operand lanes;
    std::memcpy(&lanes, from, sizeof lanes);
    return lanes;
  }
  static Operand load_some(const float* from, int64_t n) {
    Operand lanes = {};
    std::memcpy(&lanes, from, n * sizeof(float));
    return lanes;
  }
  static Floats add(Floats sum, Operand a, Operand b) { return sum + a * b; }
};

template <>
struct Step<bf16> {
#ifdef __AVX512BF16__
  static constexpr int width = 32;
  using Operand = __m512i;
  static Operand load(const bf16* from) { return _mm512_loadu_si512(from); }
  static Operand load_some(const bf16* from, int64_t n) { return _mm512_maskz_loadu_epi16((1u << n) - 1, from); }
  static Floats add(Floats sum, Operand a, Operand b) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
#else
  static constexpr int width = kLanes;
  using Operand = Floats;
  static Operand load(const bf16* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return (Floats)(__builtin_convertvector(halves, Words) << 16);
  }
  static Operand load_some(const bf16* from, int64_t n) {
    bf16 padded[width] = {};
    std::memcpy(padded, from, n * sizeof(bf16));
    return load(padded);
  }
  static Floats add(Floats sum, Operand a, Operand b) { return sum + a * b; }
#endif
};

// out[r][c] = delta row r . x of token c, over `size` features.
template <class T, int R, int C>
void dots(const T* delta, int64_t size, const T* const* x, float out[R][C]) {
  Floats sums[R][C] = {};
  auto step = [&](auto load, int64_t i) {
    typename Step<T>::Operand row[R];
    for (int r = 0; r < R; r++) row[r] = load(delta + r * size + i);
    for (int c = 0; c < C; c++) {
      auto token = load(x[c] + i);
      for (int r = 0; r < R; r++) sums[r][c] = Step<T>::add(sums[r][c], row[r], token);
    }
  };
  int64_t i = 0, rest = size % Step<T>::width;
  for (; i < size - rest; i += Step<T>::width) step([](const T* from) { return Step<T>::load(from); }, i);
  if (rest) step([&](const T* from) { return Step<T>::load_some(from, rest); }, i);
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) {
      float total = 0;
      for (int lane = 0; lane < kLanes; lane++) total += sums[r][c][lane];
      out[r][c] = total;
    }
}

template <class T>
struct Task {  // one ability's rows and the tokens that use it
  const Segment& segment;
  const int32_t* tokens;
  const float* weights;
  const T* x;
  int64_t x_stride;
  T* y;
  int64_t y_stride, size;

  template <int R, int C>
  void block(int64_t n, int64_t p) const {
    const T* inputs[C];
    for (int c = 0; c < C; c++) inputs[c] = x + tokens[p + c] * x_stride;
    float values[R][C];
    dots<T, R, C>(static_cast<const T*>(segment.delta) + n * size, size, inputs, values);
    for (int r = 0; r < R; r++) {
      float bias = segment.bias ? to_float(static_cast<const T*>(segment.bias)[n + r]) : 0.0f;
      for (int c = 0; c < C; c++) {
        T* place = y + tokens[p + c] * y_stride + segment.rows[n + r];
        store(place, to_float(*place) + weights[p + c] * (values[r][c] + bias));
      }
    }
  }

  template <int R>
  void rows(int64_t n, int64_t used) const {
    int64_t p = 0;
    for (; p + 4 <= used; p += 4) block<R, 4>(n, p);
    if (used - p == 3) block<R, 3>(n, p);
    if (used - p == 2) block<R, 2>(n, p);
    if (used - p == 1) block<R, 1>(n, p);
  }
};

template <class T>
void add_rows(const Segment* segments, int64_t abilities, const int32_t* starts, const int32_t* tokens,
              const float* weights, const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t size,
              int64_t outputs) {
  int64_t bytes = 0, products = 0;
  for (int64_t a = 0; a < abilities; a++) {
    int64_t used = starts[a + 1] - starts[a], elements = used ? segments[a].count * size : 0;
    bytes += elements * sizeof(T);
    products += elements * used;
  }
  int64_t wanted = std::max(bytes / kBytesWorthAThread, products / kProductsWorthAThread);
  int threads = static_cast<int>(std::clamp<int64_t>(wanted, 1, omp_get_max_threads()));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
    int32_t first = outputs * me / all, end = outputs * (me + 1) / all;
    for (int64_t a = 0; a < abilities; a++) {
      int64_t used = starts[a + 1] - starts[a];
      if (!used) continue;
      const Segment& segment = segments[a];
      const int32_t* last = segment.rows + segment.count;
      int64_t n = std::lower_bound(segment.rows, last, first) - segment.rows;
      int64_t stop = std::lower_bound(segment.rows, last, end) - segment.rows;
      Task<T> task{segment, tokens + starts[a], weights + starts[a], x, x_stride, y, y_stride, size};
      for (; n + 2 <= stop; n += 2) task.template rows<2>(n, used);
      if (n < stop) task.template rows<1>(n, used);
    }
  }
}

template <class T>
void scatter(const int32_t* rows, int64_t count, const int32_t* tokens, const float* weights, int64_t used,
             const T* values, T* y, int64_t y_stride) {
#pragma omp parallel for if (used * count > 16384)
  for (int64_t p = 0; p < used; p++) {
    T* output = y + tokens[p] * y_stride;
    const T* value = values + p * count;
    for (int64_t n = 0; n < count; n++) {
      T* place = output + rows[n];
      store(place, to_float(*place) + weights[p] * to_float(value[n]));
    }
  }
}

}  // namespace

#define EXPORT(T)                                                                                                   \
  extern "C" void add_rows_##T(const Segment* segments, int64_t abilities, const int32_t* starts,                   \
                               const int32_t* tokens, const float* weights, const T* x, int64_t x_stride, T* y,     \
                               int64_t y_stride, int64_t size, int64_t outputs) {                                   \
    add_rows<T>(segments, abilities, starts, tokens, weights, x, x_stride, y, y_stride, size, outputs);             \
  }                                                                                                                 \
  extern "C" void scatter_##T(const int32_t* rows, int64_t count, const int32_t* tokens, const float* weights,      \
                              int64_t used, const T* values, T* y, int64_t y_stride) {                              \
    scatter<T>(rows, count, tokens, weights, used, values, y, y_stride);                                            \
  }
EXPORT(float)
EXPORT(bf16)
