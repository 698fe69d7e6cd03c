// Where the fields of the structs lie, so that Python can compare them with its own by name.
#include "runtime.h"
#include <cstddef>
#include <string>

#define FIELDS(F)                                                                                  \
    F(Step, kind) F(Step, lanes) F(Step, samples) F(Step, in) F(Step, extra) F(Step, out)          \
    F(Step, in_stride) F(Step, out_stride) F(Step, channels) F(Step, pixels) F(Step, function)     \
    F(Step, whole) F(Step, extra_stride) F(Step, group) F(Step, groups) F(Step, blocks)            \
    F(Step, positions) F(Step, unit) F(Step, column_step) F(Step, rows) F(Step, panel_pixels)      \
    F(Step, panel_lanes) F(Step, by_tile) F(Step, tiles) F(Step, tiles_per_panel) F(Step, taps)    \
    F(Step, tile) F(Step, pointer) F(Step, entries) F(Step, order) F(Step, bias) F(Step, split)    \
    F(Step, cut) F(Step, row_source) F(Step, tap_row) F(Step, table) F(Step, base) F(Step, scale)  \
    F(Step, low) F(Step, high)                                                                     \
    F(Tile, rows) F(Tile, columns) F(Tile, list) F(Tile, in) F(Tile, out)                          \
    F(Call, steps) F(Call, step_count) F(Call, count) F(Call, activations) F(Call, panel)          \
    F(Call, threads) F(Call, together) F(Call, seconds)
#define FIELD(type, name) + line(#type "." #name, offsetof(type, name), sizeof(type::name))
#define STRUCT(type) + line(#type, 0, sizeof(type))

static std::string line(const char *name, size_t offset, size_t bytes) {
    return std::string(name) + ' ' + std::to_string(offset) + ' ' + std::to_string(bytes) + '\n';
}

extern "C" const char *pruneflow_fields() {
    static const std::string lines =
        std::string() STRUCT(Step) STRUCT(Tile) STRUCT(Call) FIELDS(FIELD);
    return lines.c_str();
}
