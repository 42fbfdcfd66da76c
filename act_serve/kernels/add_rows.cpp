// Adds weighted ability rows to a layer's output: see add_rows_reference in reference.py for the formula.
//
// Compiled once per machine by native.py. Every thread owns a range of output columns, or of tokens where there are
// many, and finds its rows or tokens in each ability's ascending list, so no two threads write the same element,
// whatever rows abilities have in common. Products are accumulated in fp32; an output is rounded once per ability.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <omp.h>
#include <type_traits>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#ifdef __AMX_BF16__
#include "tiles.h"
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

struct Call {  // what a layer and a step have beside activations; native.py fills it
  const Segment* segments;
  int64_t abilities;
  const int32_t* starts;  // of an ability's uses among the tokens and weights
  const int32_t* tokens;
  const float* weights;
  int64_t size, outputs, step_tokens;
};

namespace {

constexpr int64_t kBytesWorthAThread = 32 << 10;
constexpr int64_t kProductsWorthAThread = 200'000;
constexpr int64_t kTokensWorthAThread = 64;  // else threads share the columns
constexpr int64_t kTokensWorthTiles = 3;

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

struct Uses {  // the tokens that use an ability, ascending, with their weights
  const int32_t* tokens;
  const float* weights;
  int64_t count;

  Uses between(int32_t first, int32_t end) const {
    const int32_t* from = std::lower_bound(tokens, tokens + count, first);
    return {from, weights + (from - tokens), std::lower_bound(from, tokens + count, end) - from};
  }
};

template <class T>
struct Task {  // rows n to stop of one ability, and the tokens that use it
  const Segment& segment;
  int64_t n, stop;
  Uses uses;
  const T* x;
  int64_t x_stride;
  T* y;
  int64_t y_stride, size;

  void by_dots() const {
    int64_t row = n;
    for (; row + 2 <= stop; row += 2) rows<2>(row);
    if (row < stop) rows<1>(row);
  }

 private:
  template <int R>
  void rows(int64_t row) const {
    int64_t p = 0;
    for (; p + 4 <= uses.count; p += 4) block<R, 4>(row, p);
    if (uses.count - p == 3) block<R, 3>(row, p);
    if (uses.count - p == 2) block<R, 2>(row, p);
    if (uses.count - p == 1) block<R, 1>(row, p);
  }

  template <int R, int C>
  void block(int64_t row, int64_t p) const {
    const T* inputs[C];
    for (int c = 0; c < C; c++) inputs[c] = x + uses.tokens[p + c] * x_stride;
    float values[R][C];
    dots<T, R, C>(static_cast<const T*>(segment.delta) + row * size, size, inputs, values);
    for (int r = 0; r < R; r++) {
      float bias = segment.bias ? to_float(static_cast<const T*>(segment.bias)[row + r]) : 0.0f;
      for (int c = 0; c < C; c++) {
        T* place = y + uses.tokens[p + c] * y_stride + segment.rows[row + r];
        store(place, to_float(*place) + uses.weights[p + c] * (values[r][c] + bias));
      }
    }
  }
};

#ifdef __AMX_BF16__
// The tokens of a step, or of one ability, as tiles take them.
class Inputs {
 public:
  // The tokens first to first + count of the step, at most 32; they serve all abilities.
  void whole_step(const bf16* x, int64_t x_stride, int64_t size, int32_t first, int64_t count) {
    fill([&](int64_t i) { return x + (first + i) * x_stride; }, count, size);
    first_ = first;
    whole_ = true;
  }
  void each_ability() { whole_ = false; }

  void add(const Task<bf16>& task) {
    if (whole_) return add_group(task, task.uses);
    for (int64_t p = 0; p < task.uses.count; p += tiles::kBlock) {
      Uses group{task.uses.tokens + p, task.uses.weights + p, std::min<int64_t>(tiles::kBlock, task.uses.count - p)};
      fill([&](int64_t i) { return task.x + group.tokens[i] * task.x_stride; }, group.count, task.size);
      add_group(task, group);
    }
  }

 private:
  template <class At>
  void fill(At at, int64_t count, int64_t size) {
    count_ = count;
    for (int64_t start = 0; start < count; start += tiles::kSide)
      panels_[start / tiles::kSide].fill(
          [&](int64_t i) { return &at(start + i)->bits; }, std::min<int64_t>(tiles::kSide, count - start), size);
  }

  void add_group(const Task<bf16>& task, const Uses& group) {
    // The last block is whole too: it takes rows before n along, whose sums are left.
    int64_t most = task.segment.count;
    for (int64_t row = task.n; row < task.stop;) {
      int64_t wide = task.stop - row > tiles::kSide && most >= tiles::kBlock ? tiles::kBlock : tiles::kSide;
      int64_t start = std::min(row, most - wide);
      if (wide == tiles::kBlock) {
        count_ > tiles::kSide ? block<2, 2>(task, group, start, row) : block<2, 1>(task, group, start, row);
      } else {
        count_ > tiles::kSide ? block<1, 2>(task, group, start, row) : block<1, 1>(task, group, start, row);
      }
      row = start + wide;
    }
  }

  template <int R, int C>
  void block(const Task<bf16>& task, const Uses& group, int64_t start, int64_t row) {
    const Segment& segment = task.segment;
    auto delta = static_cast<const uint16_t*>(segment.delta) + start * task.size;
    for (int64_t p = 0; p < group.count; p++) {  // outputs that have left the cache come back meanwhile
      const bf16* y = task.y + group.tokens[p] * task.y_stride;
      for (int r = 0; r < R * tiles::kSide; r += 2) _mm_prefetch(y + segment.rows[start + r], _MM_HINT_T0);
    }
    tiles::multiply<R, C>(delta, task.size, panels_, sums_);
    for (int r = 0; r < R; r++) {
      int64_t at = start + r * tiles::kSide;
      int skip = static_cast<int>(std::clamp<int64_t>(row - at, 0, tiles::kSide));
      int end = static_cast<int>(std::clamp<int64_t>(task.stop - at, 0, tiles::kSide));
      auto bias = segment.bias ? static_cast<const uint16_t*>(segment.bias) + at : nullptr;
      for (int64_t p = 0; p < group.count; p++) {
        const float* values = sums_[whole_ ? group.tokens[p] - first_ : p] + r * tiles::kSide;
        uint16_t* y = &task.y[group.tokens[p] * task.y_stride].bits;
        tiles::scatter(segment.rows + at, values, bias, group.weights[p], skip, end, y);
      }
    }
  }

  tiles::Panel panels_[2];
  alignas(64) float sums_[tiles::kBlock][tiles::kBlock];
  int64_t count_ = 0;
  int32_t first_ = 0;
  bool whole_ = false;
};
#endif

struct Share {  // what one thread computes: columns first to end of the tokens from to until
  int32_t first, end, from, until;
};

template <class T>
void add_share(const Call& call, const T* x, int64_t x_stride, T* y, int64_t y_stride, Share share) {
  auto each = [&](auto work) {
    for (int64_t a = 0; a < call.abilities; a++) {
      int32_t start = call.starts[a];
      Uses all{call.tokens + start, call.weights + start, call.starts[a + 1] - start};
      Uses uses = all.between(share.from, share.until);
      if (!uses.count) continue;
      const Segment& segment = call.segments[a];
      const int32_t* last = segment.rows + segment.count;
      int64_t n = std::lower_bound(segment.rows, last, share.first) - segment.rows;
      int64_t stop = std::lower_bound(segment.rows, last, share.end) - segment.rows;
      if (n < stop) work(Task<T>{segment, n, stop, uses, x, x_stride, y, y_stride, call.size});
    }
  };
#ifdef __AMX_BF16__
  if constexpr (std::is_same_v<T, bf16>) {
    int64_t count = share.until - share.from;
    if (count >= kTokensWorthTiles && tiles::allowed()) {
      static thread_local Inputs inputs;
      tiles::Setup setup;
      if (count <= tiles::kBlock) inputs.whole_step(x, x_stride, call.size, share.from, count);
      else inputs.each_ability();
      each([&](const Task<T>& task) { task.segment.count < tiles::kSide ? task.by_dots() : inputs.add(task); });
      return;
    }
  }
#endif
  each([](const Task<T>& task) { task.by_dots(); });
}

template <class T>
void add_rows(const Call& call, const T* x, int64_t x_stride, T* y, int64_t y_stride) {
  int64_t bytes = 0, products = 0;
  for (int64_t a = 0; a < call.abilities; a++) {
    int64_t used = call.starts[a + 1] - call.starts[a], elements = used ? call.segments[a].count * call.size : 0;
    bytes += elements * sizeof(T);
    products += elements * used;
  }
  int64_t wanted = std::max(bytes / kBytesWorthAThread, products / kProductsWorthAThread);
  int threads = static_cast<int>(std::clamp<int64_t>(wanted, 1, omp_get_max_threads()));
  int32_t every = static_cast<int32_t>(call.outputs), last = static_cast<int32_t>(call.step_tokens);
  if (threads == 1) return add_share<T>(call, x, x_stride, y, y_stride, {0, every, 0, last});
#pragma omp parallel num_threads(threads)
  {
    int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
    auto part = [&](int64_t whole, int64_t number) { return static_cast<int32_t>(whole * number / all); };
    Share share = last >= kTokensWorthAThread * all ? Share{0, every, part(last, me), part(last, me + 1)}
                                                    : Share{part(every, me), part(every, me + 1), 0, last};
    add_share<T>(call, x, x_stride, y, y_stride, share);
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
  extern "C" void add_rows_##T(const Call* call, const T* x, int64_t x_stride, T* y, int64_t y_stride) {            \
    add_rows<T>(*call, x, x_stride, y, y_stride);                                                                   \
  }                                                                                                                 \
  extern "C" void scatter_##T(const int32_t* rows, int64_t count, const int32_t* tokens, const float* weights,      \
                              int64_t used, const T* values, T* y, int64_t y_stride) {                              \
    scatter<T>(rows, count, tokens, weights, used, values, y, y_stride);                                            \
  }
EXPORT(float)
EXPORT(bf16)

// Whether bfloat16 goes through tiles, for any number of tokens.
extern "C" int has_tiles() {
#ifdef __AMX_BF16__
  return tiles::allowed();
#else
  return 0;
#endif
}
