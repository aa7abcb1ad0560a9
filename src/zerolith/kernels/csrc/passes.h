// One pass over memory: the loops around the rules, the sums, and the split.
#pragma once

#include "rules.h"

namespace {

constexpr Index ROW = 32;  // elements of one turn of a loop: a cache line of bf16
constexpr Index FETCH_BYTES = 1024;  // how far ahead memory is asked for

// --- where weights lie ----------------------------------------------------------------------------------------------

struct PlainMaster {
    static constexpr int bytes = 4, remainder_bytes = 0;
    static Floats read(const Streams& s, Index at) { return load<Floats>(static_cast<float*>(s.master) + at); }
    static void write(const Streams& s, Index at, Floats a, Floats b) {
        store(static_cast<float*>(s.master) + at, a);
        store(static_cast<float*>(s.master) + at + W, b);
    }
};

struct SplitMaster {
    static constexpr int bytes = 2, remainder_bytes = 2;
    static Floats read(const Streams& s, Index at) {
        return join(load<Vector<uint16_t, W>>(static_cast<uint16_t*>(s.master) + at),
                    load<Vector<int16_t, W>>(s.remainder + at));
    }
    static void write(const Streams& s, Index at, Floats a, Floats b) {
        const SplitPair pair = split(a, b);
        store(static_cast<uint16_t*>(s.master) + at, pair.weight);
        store(s.remainder + at, pair.remainder);
    }
};

struct Nowhere {
    static constexpr int bytes = 0;
    template <bool streaming>
    static void put(char*, Floats, Floats) {}
};

// Asks for the cache lines of a later row. Processors stop fetching ahead by themselves where a page ends, which with
// several streams is often: without this, one thread took a third longer than a mere copy. May point past the end.
template <int bytes>
inline void fetch(const void* base, Index row) {
    const uintptr_t ahead = reinterpret_cast<uintptr_t>(base) + row * bytes + FETCH_BYTES;
    for (Index line = 0; line < ROW * bytes; line += 64) {
        __builtin_prefetch(reinterpret_cast<const void*>(ahead + line));
    }
}

template <class Format>
inline char* item(const void* base, Index at) {
    return const_cast<char*>(static_cast<const char*>(base)) + at * Format::bytes;
}

// --- updates --------------------------------------------------------------------------------------------------------

template <class Rule, class Grad, class Master>
inline Floats update_lanes(const Constants& k, const Streams& s, Index at) {
    Floats weight = Master::read(s, at), first = {}, second = {};
    if constexpr (Rule::states > 0) first = load<Floats>(s.first + at);
    if constexpr (Rule::states > 1) second = load<Floats>(s.second + at);
    Rule::apply(k, Grad::widen(item<Grad>(s.grad, at)) * k.grad_factor, weight, first, second);
    if constexpr (Rule::states > 0) store(s.first + at, first);
    if constexpr (Rule::states > 1) store(s.second + at, second);
    return weight;
}

template <class Rule, class Grad, class Master, class Out, bool streaming>
__attribute__((flatten)) void update_rows(const Scalars& scalars, const Streams& streams, Index begin, Index end) {
    const Constants k(scalars);
    const Streams s = streams;
    for (Index row = begin; row < end; row += ROW) {
        fetch<Grad::bytes>(s.grad, row);
        fetch<Master::bytes>(s.master, row);
        fetch<Master::remainder_bytes>(s.remainder, row);
        if constexpr (Rule::states > 0) fetch<4>(s.first, row);
        if constexpr (Rule::states > 1) fetch<4>(s.second, row);
#pragma GCC unroll 4
        for (int pair = 0; pair < ROW / W / 2; ++pair) {
            const Index at = row + pair * 2 * W;
            const Floats a = update_lanes<Rule, Grad, Master>(k, s, at);
            const Floats b = update_lanes<Rule, Grad, Master>(k, s, at + W);
            Master::write(s, at, a, b);
            Out::template put<streaming>(item<Out>(s.out, at), a, b);
        }
    }
}

// Fewer elements than a row, by way of a row of their own.
template <class Rule, class Grad, class Master, class Out>
void update_part(const Scalars& k, const Streams& s, Index begin, Index end) {
    alignas(64) char grad[ROW * 4] = {}, master[ROW * 4] = {}, out[ROW * 4] = {};
    int16_t remainder[ROW] = {};
    float first[ROW] = {}, second[ROW] = {};
    const Streams row = {grad, master, remainder, first, second, out};
    const Index count = end - begin;
    __builtin_memcpy(grad, item<Grad>(s.grad, begin), count * Grad::bytes);
    __builtin_memcpy(master, item<Master>(s.master, begin), count * Master::bytes);
    if constexpr (Master::remainder_bytes > 0) __builtin_memcpy(remainder, s.remainder + begin, count * 2);
    if constexpr (Rule::states > 0) __builtin_memcpy(first, s.first + begin, count * 4);
    if constexpr (Rule::states > 1) __builtin_memcpy(second, s.second + begin, count * 4);
    update_rows<Rule, Grad, Master, Out, false>(k, row, 0, ROW);
    __builtin_memcpy(item<Master>(s.master, begin), master, count * Master::bytes);
    if constexpr (Master::remainder_bytes > 0) __builtin_memcpy(s.remainder + begin, remainder, count * 2);
    if constexpr (Rule::states > 0) __builtin_memcpy(s.first + begin, first, count * 4);
    if constexpr (Rule::states > 1) __builtin_memcpy(s.second + begin, second, count * 4);
    if constexpr (Out::bytes > 0) __builtin_memcpy(item<Out>(s.out, begin), out, count * Out::bytes);
}

// Whether streaming stores reach the heads of cache lines from `out` in whole elements.
template <class Format>
inline bool can_stream(const void* out) {
    return reinterpret_cast<uintptr_t>(out) % Format::bytes == 0;
}

// Elements until `out` is at the head of a cache line.
template <class Format>
inline Index misaligned(const void* out, Index numel) {
    const Index count = (-reinterpret_cast<uintptr_t>(out) & 63) / Format::bytes;
    return count < numel ? count : numel;
}

template <class Rule, class Grad, class Master, class Out>
void update(const Scalars& k, const Streams& s, Index numel, bool streaming) {
    Index begin = 0;
    if constexpr (Out::bytes > 0) {
        streaming = streaming && can_stream<Out>(s.out);
        if (streaming) begin = misaligned<Out>(s.out, numel);
        if (begin > 0) update_part<Rule, Grad, Master, Out>(k, s, 0, begin);
    }
    const Index end = begin + (numel - begin) / ROW * ROW;
    if (Out::bytes > 0 && streaming) {
        update_rows<Rule, Grad, Master, Out, true>(k, s, begin, end);
        end_streams();
    } else {
        update_rows<Rule, Grad, Master, Out, false>(k, s, begin, end);
    }
    if (end < numel) update_part<Rule, Grad, Master, Out>(k, s, end, numel);
}

// --- sums -----------------------------------------------------------------------------------------------------------

constexpr int LANES = 16;  // of a block: lane j adds the squares of elements j, j + 16, ...

// Squares of fp32 numbers are exact in fp64 and never overflow; each addition rounds once, in an order that is fixed:
// lanes from the head of the block, then lane j and lane j + 8, j + 4, j + 2, j + 1.
template <class Format>
inline double block_square_sum(const char* values) {
    WidePair lanes[LANES / W] = {};
    for (Index row = 0; row < BLOCK; row += ROW) {
#pragma GCC unroll 8
        for (int part = 0; part < ROW / W; ++part) {
            const WidePair x = widen_to_fp64<Format>(values + (row + part * W) * Format::bytes);
            WidePair& lane = lanes[part % (LANES / W)];
            lane.low += x.low * x.low;
            lane.high += x.high * x.high;
        }
    }
    double terms[LANES];
    __builtin_memcpy(terms, lanes, sizeof terms);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int lane = 0; lane < width; ++lane) terms[lane] += terms[lane + width];
    return terms[0];
}

template <class Format>
void square_sums(const void* values, Index numel, double* blocks) {
    for (Index begin = 0; begin < numel; begin += BLOCK) {
        const char* from = item<Format>(values, begin);
        alignas(64) char padded[BLOCK * 4] = {};
        if (numel - begin < BLOCK) {
            __builtin_memcpy(padded, from, (numel - begin) * Format::bytes);
            from = padded;
        } else {
            for (Index row = 0; row < BLOCK; row += ROW) fetch<Format::bytes>(from, row);
        }
        blocks[begin / BLOCK] = block_square_sum<Format>(from);
    }
}

// total = (adding to it, or to nothing) the block's elements of each term, from the left.
template <class Format>
inline void add_block(float* total, bool fresh, const void* const* terms, int num_terms, Index begin) {
    for (int term = 0; term < num_terms; ++term) {
        const char* values = item<Format>(terms[term], begin);
        const bool first = fresh && term == 0;
        for (Index row = 0; row < BLOCK; row += ROW) {
            fetch<Format::bytes>(values, row);
#pragma GCC unroll 8
            for (Index at = row; at < row + ROW; at += W) {
                const Floats x = Format::widen(values + at * Format::bytes);
                store(total + at, first ? x : load<Floats>(total + at) + x);
            }
        }
    }
}

template <bool streaming>
inline void put_block(float* sum, const float* total) {
#pragma GCC unroll 8
    for (Index at = 0; at < BLOCK; at += W) put<streaming>(sum + at, load<Floats>(total + at));
}

// Elements [begin, begin + numel) of the terms to `sum`; the square sums of what comes out to `blocks`, if given.
template <class Format>
void add_terms(float* sum, bool fresh, const void* const* terms, int32_t num_terms, Index begin, Index numel,
               double* blocks, bool streaming) {
    streaming = streaming && reinterpret_cast<uintptr_t>(sum) % sizeof(Floats) == 0;
    Index done = 0;
    for (; done + BLOCK <= numel; done += BLOCK) {
        alignas(64) float total[BLOCK];
        if (!fresh) {
            for (Index row = 0; row < BLOCK; row += ROW) fetch<4>(sum + done, row);
            __builtin_memcpy(total, sum + done, sizeof total);
        }
        add_block<Format>(total, fresh, terms, num_terms, begin + done);
        if (streaming) {
            put_block<true>(sum + done, total);
        } else {
            put_block<false>(sum + done, total);
        }
        if (blocks) blocks[done / BLOCK] = block_square_sum<Fp32>(reinterpret_cast<const char*>(total));
    }
    if (streaming) end_streams();
    if (done == numel) return;
    const Index count = numel - done;  // fewer than a block, filled up with zeros
    alignas(64) float total[BLOCK] = {};
    if (!fresh) __builtin_memcpy(total, sum + done, count * 4);
    for (int term = 0; term < num_terms; ++term) {
        alignas(64) char padded[BLOCK * 4] = {};
        __builtin_memcpy(padded, item<Format>(terms[term], begin + done), count * Format::bytes);
        const void* values = padded;
        add_block<Format>(total, fresh && term == 0, &values, 1, 0);
    }
    __builtin_memcpy(sum + done, total, count * 4);
    if (blocks) blocks[done / BLOCK] = block_square_sum<Fp32>(reinterpret_cast<const char*>(total));
}

// --- the split ------------------------------------------------------------------------------------------------------

constexpr Index PAIR = 2 * W;

inline void split_some(float* master, uint16_t* weight, int16_t* remainder, Index count) {
    Floats x[2] = {};
    __builtin_memcpy(x, master, count * 4);
    const SplitPair pair = split(x[0], x[1]);
    __builtin_memcpy(weight, &pair.weight, count * 2);
    __builtin_memcpy(remainder, &pair.remainder, count * 2);
}

inline void join_some(float* master, uint16_t* weight, int16_t* remainder, Index count) {
    Vector<uint16_t, W> upper[2] = {};
    Vector<int16_t, W> lower[2] = {};
    __builtin_memcpy(upper, weight, count * 2);
    __builtin_memcpy(lower, remainder, count * 2);
    const Floats x[2] = {join(upper[0], lower[0]), join(upper[1], lower[1])};
    __builtin_memcpy(master, x, count * 4);
}

template <void (*some)(float*, uint16_t*, int16_t*, Index)>
void convert(float* master, uint16_t* weight, int16_t* remainder, Index numel) {
    Index at = 0;
    for (; at + PAIR <= numel; at += PAIR) some(master + at, weight + at, remainder + at, PAIR);
    if (at < numel) some(master + at, weight + at, remainder + at, numel - at);
}

// --- a yardstick ----------------------------------------------------------------------------------------------------

// The reads and writes of Adam and no arithmetic: master and states change places, in a circle of three, and `out`, if
// there is one, becomes the gradient, whose format it has. Of a gradient that goes nowhere a word per cache line is
// read. Only whole rows.
template <class Format, bool has_out, bool streaming>
void copy_rows(const Streams& streams, Index numel) {
    const Streams s = streams;
    using Raw = Vector<uint8_t, W * Format::bytes>;
    float* master = static_cast<float*>(s.master);
    for (Index row = 0; row + ROW <= numel; row += ROW) {
        fetch<Format::bytes>(s.grad, row);
        fetch<4>(s.master, row);
        fetch<4>(s.first, row);
        fetch<4>(s.second, row);
        const char* grad = item<Format>(s.grad, row);
#pragma GCC unroll 8
        for (int part = 0; part < ROW / W; ++part) {
            const Index at = row + part * W;
            const Floats weight = load<Floats>(master + at), first = load<Floats>(s.first + at);
            store(master + at, load<Floats>(s.second + at));
            store(s.first + at, weight);
            store(s.second + at, first);
            if constexpr (has_out) {
                put<streaming>(item<Format>(s.out, at), load<Raw>(grad + part * W * Format::bytes));
            }
        }
        if constexpr (!has_out) {
            for (Index line = 0; line < ROW * Format::bytes; line += 64) {
                __asm__ volatile("" : : "r"(load<uint64_t>(grad + line)));
            }
        }
    }
    if (streaming) end_streams();
}

template <class Format>
void copy(const Streams& s, Index numel, bool streaming) {
    if (s.out == nullptr) {
        copy_rows<Format, false, false>(s, numel);
    } else if (streaming && reinterpret_cast<uintptr_t>(s.out) % 64 == 0) {
        copy_rows<Format, true, true>(s, numel);
    } else {
        copy_rows<Format, true, false>(s, numel);
    }
}

}  // namespace
