// The interface between pruneflow/deploy/runtime/lowering.py and the native code: a plan is an
// array of steps over one arena of floats. All addresses are floats from the arena's start.
//
// Two layouts of an activation of C channels and P pixels, for plans of m samples:
//   lanes   [m / LANES][C][P][LANES]  a vector holds samples of one pixel
//   pixels  [C][m * P]                rounded up to whole vectors, or to 4 or 8 floats if there are
//                                     so few: a vector holds pixels
// In both, a convolution is a sum over surviving weights of weight x vectors at an offset, so that
// one micro-kernel serves both. In `pixels`, offsets within a channel are no whole vectors, and the
// input of a tile is first copied into a panel: a row per input channel and tap that is used.
#pragma once
#include <cstdint>

#if defined(__AVX512F__)
#define LANES 16
#define REGISTERS 32
#elif defined(__AVX__)
#define LANES 8
#define REGISTERS 16
#else
#define LANES 4
#define REGISTERS 16
#endif
#define MAX_ROWS 8

enum Kind : int64_t {
    LOAD,
    STORE,
    CONVOLUTION,
    POOL,
    ADD,
    FLATTEN,
    MATRIX,
    ACTIVATE,
    MULTIPLY,
    DEPTHWISE
};
enum Function : int64_t { SIGMOID, HARDSIGMOID, SILU, HARDSWISH };

// Vectors of the output that are computed together: rows of columns that lie side by side. They
// share the list of the weights that do not fall on the padding.
struct Tile {
    int32_t rows, columns, list;
    int32_t in[MAX_ROWS], out[MAX_ROWS]; // the first column's, in channel 0
};

struct Step {
    int64_t kind;
    int64_t lanes;                 // whether the layout is `lanes`
    int64_t samples;               // of the plan
    int64_t in, extra, out;        // extra: a second input that is added; negative: none
    int64_t in_stride, out_stride; // from channel to channel
    int64_t channels, pixels;      // of the output; LOAD, STORE, FLATTEN: of the input; POOL, ADD,
                                   // ACTIVATE, MULTIPLY: channels of all samples in `lanes`
    int64_t function;              // ACTIVATE
    int64_t whole;                 // POOL: whether it takes the mean of all pixels, as they lie
    int64_t extra_stride;          // MULTIPLY by one pixel for each channel: of `extra`; or 0
    // CONVOLUTION: entries are an index and one weight for each output channel of a group.
    int64_t group, groups, blocks; // channels in a group; groups; ranges of the input held in L1
    int64_t positions;             // not 0: vectors hold output channels, of so many positions
    int64_t unit;                  // floats that one index stands for; 0: a row of the panel
    int64_t column_step;           // vectors from one column of a tile to the next in the input
    int64_t rows;                  // of the panel; 0: without
    int64_t panel_pixels;          // of a row, in the layout `lanes`
    int64_t panel_lanes;           // floats of a vector: fewer than LANES where there are no more
    int64_t by_tile;               // threads share out tiles; otherwise groups
    int64_t tiles, tiles_per_panel;
    int64_t taps;                  // of `table`
    const Tile *tile;
    const int32_t *pointer;        // [list][block][groups + 1]: where a group's entries begin
    const int32_t *entries;
    const int32_t *order;          // [groups]: they are sorted by how many entries they have, so
                                   // that the processor foresees where loops end
    const float *bias;             // [groups * group], in the order of channels
    const int32_t *split;          // [threads + 1]: groups of each thread
    const int32_t *cut;            // [blocks + 1]: rows of each, in the layout `pixels`
    const int32_t *row_source;     // [rows]: the channel's start, in the layout `pixels`
    const int32_t *tap_row;        // [taps + 1]: the first row of each
    const int32_t *table;          // [tap][position]: where in the input's channel; -1: padding;
                                   // in the layout `lanes` [position] of a panel
    const int32_t *base;           // [tap][vector of positions]: see with_picker
    const float *scale;            // [position]: POOL takes the mean; null: the maximum
    float low, high;               // the result is clamped; infinities: as it is
    // DEPTHWISE: in the layout `pixels`; `entries` are weights [tap][channel].
    // MATRIX: a convolution of few positions as a sparse matrix of a row for each float of the
    // output. Rows are sorted by how many weights they have, and a group is a vector of them. Its
    // entries are, for the first weight of each row, for the second and so on, how many rows have
    // one, and of each of these where it reads in the input, and then the weights. `pointer`
    // tells where a group begins, `order` where a row goes in the output, and -1 where no row is;
    // `bias` is in the order of rows.
};

// A batch of `count` samples, `steps[0].samples` of them at a time. Together: all threads on the same
// samples and one arena, `activations` floats and as many panels as threads; otherwise each on its
// own samples and an arena of its own, all of `activations + panel` floats.
struct Call {
    const Step *steps;
    int64_t step_count, count;
    int64_t activations, panel;
    int64_t threads, together;
    double *seconds; // null, or how long each step takes
};

extern "C" {
int pruneflow_lanes();
int pruneflow_registers();
const char *pruneflow_fields(); // lines of a struct's or field's name, offset and bytes
int pruneflow_threads(int threads); // 0 if so many can be started
int pruneflow_run(const Call *call, const float *in, float *out, float *arena); // 0 if it ran
}
