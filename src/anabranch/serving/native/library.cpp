// The functions Python calls. None of them throws: sizes are checked there.
#include <functional>
#include <memory>

#include "invariant.h"
#include "draw.h"
#include "step.h"

namespace {

using namespace anabranch;

struct Handle {
    Handle(const AnabranchModel& model, int threads) : team(threads) {
        switch (model.weights) {
            case 0: run = runner<F32>(model); break;
            case 1: run = runner<BF16>(model); break;
            default: run = runner<INT8>(model);
        }
    }

    template <class Kind>
    std::function<int(const AnabranchRows&)> runner(const AnabranchModel& model) {
        return [step = std::make_shared<Step<Kind>>(model, team)](const AnabranchRows& rows) { return step->run(rows); };
    }

    Team team;
    std::vector<Drawer> drawers;
    std::function<int(const AnabranchRows&)> run;
};

// One line of numbers as codes, in int4: number = zero + scale * code. Codes are of the rounded scale and zero, the
// scale rounded up, so that the largest number has a code.
struct Coded {
    bf16 scale, zero;
};

inline bf16 at_least(float value) {
    bf16 rounded;
    narrow(&rounded, value);
    if (widen(rounded) < value) ++rounded.bits;
    return rounded;
}

// Where in SCALES the smallest scale is at which all numbers of a line have a code in it.
int place_for(const float* from, int n) {
    float most = 0.0f;
    for (int i = 0; i < n; ++i) most = std::max(most, std::fabs(from[i]));
    return static_cast<int>(std::lower_bound(SCALES.begin(), SCALES.end() - 1, most / 127.0f) - SCALES.begin());
}

// The nearest code of a number, of those that are `apart`, with `bit` one of them.
int8_t code8(float number, float inverse, int apart, int bit) {
    const float wanted = std::clamp(number * inverse, -127.0f, 127.0f);
    const auto nearest = apart * std::lrint((wanted - bit) / apart) + bit;
    return static_cast<int8_t>(nearest > 127 ? 126 : nearest);
}

// A block of lines of n numbers each, as it lies in an int8 page: see places_of.
void quantise_int8(const float* from, int lines, int n, int8x2* to) {
    std::vector<int> places(lines);
    std::vector<float> inverses(lines);
    for (int i = 0; i < lines; ++i) {
        places[i] = place_for(from + int64_t{i} * n, n);
        inverses[i] = 1.0f / SCALES[places[i]];
    }
    auto* codes = reinterpret_cast<int8_t*>(to);
    int at = 0;
    for (int pair = 0; pair < lines; pair += 2)
        for (int i = 0; i < n; ++i)
            for (int line = pair; line < pair + 2; ++line, ++at) {
                const bool tells = at < 8 * lines;
                const int bit = tells ? places[at % lines] >> at / lines & 1 : 0;
                codes[at] = code8(from[line * n + i], inverses[line], tells ? 2 : 1, bit);
            }
}

Coded code4(const float* from, int n, uint8_t* to) {
    float low = from[0], high = low;
    for (int i = 1; i < n; ++i) {
        low = std::min(low, from[i]);
        high = std::max(high, from[i]);
    }
    Coded coded;
    narrow(&coded.zero, low);
    const float zero = widen(coded.zero);
    coded.scale = at_least((high - zero) / 15.0f);
    const float inverse = high > zero ? 1.0f / widen(coded.scale) : 0.0f;
    for (int i = 0; i < n; ++i)
        to[i] = static_cast<uint8_t>(std::min(15L, std::max(0L, std::lrint((from[i] - zero) * inverse))));
    return coded;
}

void quantise_int4(const float* keys, uint8_t* to, int dim) {
    const float* values = keys + int64_t{PAGE} * dim;
    uint8_t* codes = to;
    auto* scale = reinterpret_cast<bf16*>(to + int64_t{PAGE} * dim);
    std::vector<uint8_t> line(2 * std::max(dim, PAGE));
    const auto two_lines = [&](const float* from, int n, bf16* scales, bf16* zeros) {
        for (int i = 0; i < 2; ++i) {
            const Coded coded = code4(from + int64_t{i} * n, n, line.data() + i * n);
            scales[i] = coded.scale;
            zeros[i] = coded.zero;
        }
        for (int i = 0; i < n; ++i) *codes++ = static_cast<uint8_t>(line[i] | line[n + i] << 4);
    };
    for (int d = 0; d < dim; d += 2) two_lines(keys + d * PAGE, PAGE, scale + d, scale + dim + d);
    scale += 2 * dim;
    for (int t = 0; t < PAGE; t += 2) two_lines(values + t * dim, dim, scale + t, scale + PAGE + t);
}

// Two lines of n numbers each as pairs, and back.
void join(const float* from, int n, bf16x2* to) {
    for (int i = 0; i < n; ++i) narrow(&to[i].even, from[i]), narrow(&to[i].odd, from[n + i]);
}
void part(const bf16x2* from, int n, float* to) {
    for (int i = 0; i < n; ++i) to[i] = widen(from[i].even), to[n + i] = widen(from[i].odd);
}

// Calls f(first of two lines, numbers of a line, where their pairs begin) for all lines of keys, then of values.
template <class F>
void by_two_lines(int dim, const F& f) {
    const int numbers = PAGE * dim;
    for (int d = 0; d < dim; d += 2) f(d * PAGE, PAGE, d / 2 * PAGE);
    for (int t = 0; t < PAGE; t += 2) f(numbers + t * dim, dim, (numbers + t * dim) / 2);
}

// One layer and head of an fp32 or bf16 page, in another format.
void rewrite_head(const uint8_t* page, Format from, uint8_t* to, Format format, int dim) {
    const size_t numbers = 2 * size_t{PAGE} * dim;
    std::vector<float> wide(numbers);
    const auto* pairs = reinterpret_cast<const bf16x2*>(page);
    if (from == KV_F32)
        std::memcpy(wide.data(), page, numbers * sizeof(float));
    else
        by_two_lines(dim, [&](int at, int n, int pair) { part(pairs + pair, n, &wide[at]); });
    if (format == KV_F32) {
        std::memcpy(to, wide.data(), numbers * sizeof(float));
    } else if (format == KV_BF16) {
        by_two_lines(dim, [&](int at, int n, int pair) { join(&wide[at], n, reinterpret_cast<bf16x2*>(to) + pair); });
    } else if (format == KV_INT8) {
        auto* pairs = reinterpret_cast<int8x2*>(to);
        quantise_int8(wide.data(), dim, PAGE, pairs);
        quantise_int8(&wide[numbers / 2], PAGE, dim, pairs + numbers / 4);
    } else {
        quantise_int4(wide.data(), to, dim);
    }
}

}  // namespace

extern "C" {

void* anabranch_open(const AnabranchModel* model, int threads) { return new Handle(*model, threads); }

void anabranch_close(void* handle) { delete static_cast<Handle*>(handle); }

// Returns 0, or 1 + the number of an expert's record that is damaged: the step is then to be repeated.
int anabranch_step(void* handle, const AnabranchRows* rows) {
    return 1 + static_cast<Handle*>(handle)->run(*rows);
}

uint64_t anabranch_checksum(const uint8_t* data, int64_t bytes) { return checksum(data, bytes); }

// tokens[i] is drawn by draws[i] from its row of `logits`, which are `stride` apart.
void anabranch_draw(void* handle, const float* logits, int64_t stride, int vocab, const AnabranchDraw* draws,
                    int count, int32_t* tokens) {
    auto& open = *static_cast<Handle*>(handle);
    open.drawers.resize(open.team.members());
    open.team.run([&](int member) {
        for (int i; (i = open.team.take()) < count;)
            tokens[i] = open.drawers[member].draw(logits + draws[i].row * stride, vocab, draws[i]);
    });
}

int64_t anabranch_page_bytes(int layers, int heads, int dim, int format) {
    return PageShape{layers, heads, dim}.page_bytes(static_cast<Format>(format));
}

// Rewrites a full fp32 or bf16 page in the format of another.
void anabranch_rewrite(uint8_t* const* pools, const int32_t* pages, int layers, int heads, int dim, int32_t from,
                       int32_t to) {
    const PageShape shape{layers, heads, dim};
    const Pools all(pools, pages);
    for (int l = 0; l < layers; ++l)
        for (int h = 0; h < heads; ++h)
            rewrite_head(all.head(shape, from, l, h), format_of(from), all.head(shape, to, l, h), format_of(to), dim);
}

// Rows of x, sorted into groups; group e, which ends before ends[e], is multiplied with matrix e of `weights`
// [groups][outputs][inputs].
void anabranch_product(const float* x, const float* weights, const int32_t* ends, float* out, int groups, int inputs,
                       int outputs) {
    Product product;
    for (int e = 0, first = 0; e < groups; first = ends[e++])
        if (ends[e] > first)
            product.run(x + int64_t{first} * inputs, weights + int64_t{e} * outputs * inputs,
                        out + int64_t{first} * outputs, ends[e] - first, inputs, outputs);
}

void anabranch_attention(const AnabranchAttention* call) { RowAttention(*call).run(); }
}
