// Runs a plan made by pruneflow/deploy/runtime/lowering.py; see runtime.h for layouts and terms.
#include "convolution.h"
#include "elementwise.h"
#include "matrix.h"
#include "taps.h"
#include "threads.h"
#include <chrono>

namespace {

void flatten(const Step &s, float *arena, Part channels) {
    for (int64_t c = channels.begin; c < channels.end; ++c) {
        const float *from = arena + s.in + c * s.in_stride;
        float *to = arena + s.out + c * s.pixels * s.out_stride;
        for (int64_t sample = 0; sample < s.samples; ++sample)
            for (int64_t pixel = 0; pixel < s.pixels; ++pixel)
                to[pixel * s.out_stride + sample] = from[sample * s.pixels + pixel];
    }
}

// Lanes of samples that the batch does not have are zero.
void load_batch(const Step &s, const float *batch, int64_t valid, float *arena, Part channels) {
    const int64_t features = s.channels * s.pixels;
    float *to = arena + s.out;
    if (s.lanes) {
        const int64_t begin = channels.begin * s.pixels, end = channels.end * s.pixels;
        for (int64_t first = 0; first < s.samples; first += LANES, to += features * LANES)
            for (int64_t low = begin; low < end; low += LANES) // as many as share a cache line
                for (int64_t lane = 0; lane < LANES; ++lane) {
                    const bool present = first + lane < valid;
                    const float *from = batch + (first + lane) * features;
                    for (int64_t i = low; i < std::min<int64_t>(low + LANES, end); ++i)
                        to[i * LANES + lane] = present ? from[i] : 0;
                }
        return;
    }
    for (int64_t c = channels.begin; c < channels.end; ++c) {
        float *row = to + c * s.out_stride;
        for (int64_t sample = 0; sample < valid; ++sample)
            std::copy_n(batch + sample * features + c * s.pixels, s.pixels,
                        row + sample * s.pixels);
        std::fill(row + valid * s.pixels, row + s.out_stride, 0.0f);
    }
}

void store_batch(const Step &s, const float *arena, float *batch, int64_t valid, Part channels) {
    const int64_t features = s.channels * s.pixels;
    for (int64_t sample = 0; sample < valid; ++sample)
        for (int64_t c = channels.begin; c < channels.end; ++c)
            for (int64_t pixel = 0; pixel < s.pixels; ++pixel) {
                const int64_t feature = c * s.pixels + pixel;
                const int64_t at = s.lanes ? (sample / LANES * features + feature) * LANES +
                                                 sample % LANES
                                           : c * s.in_stride + sample * s.pixels + pixel;
                batch[sample * features + feature] = arena[s.in + at];
            }
}

struct Run {
    const Call &call;
    const float *in;
    float *out, *arena;
    Barrier team;
};

void run_steps(const Run &run, float *arena, int64_t piece, Barrier &team, int thread) {
    const Call &call = run.call;
    // Behind the activations, those of one arena if they are of one for all.
    float *panel = arena + call.activations + (call.together ? thread : 0) * call.panel;
    using Clock = std::chrono::steady_clock;
    Clock::time_point began;
    for (int64_t i = 0; i < call.step_count; ++i) {
        if (call.seconds)
            began = Clock::now();
        const Step &s = call.steps[i];
        const int64_t first = piece * s.samples, valid = std::min(s.samples, call.count - first);
        const int64_t features = s.channels * s.pixels;
        const Part channels = share(s.channels, thread, team.threads);
        switch (s.kind) {
        case LOAD:
            load_batch(s, run.in + first * features, valid, arena, channels);
            break;
        case STORE:
            store_batch(s, arena, run.out + first * features, valid, channels);
            break;
        case CONVOLUTION:
            convolution(s, arena, panel, thread, team.threads);
            break;
        case MATRIX:
            matrix(s, arena, thread, team.threads);
            break;
        case DEPTHWISE:
            depthwise(s, arena, channels);
            break;
        case POOL:
            s.scale ? pool<true>(s, arena, channels) : pool<false>(s, arena, channels);
            break;
        case ADD:
            add(s, arena, thread, team.threads);
            break;
        case ACTIVATE:
            activate(s, arena, thread, team.threads);
            break;
        case MULTIPLY:
            multiply(s, arena, channels);
            break;
        case FLATTEN:
            flatten(s, arena, channels);
            break;
        }
        team.wait();
        if (call.seconds && thread == 0)
            call.seconds[i] = std::chrono::duration<double>(Clock::now() - began).count();
    }
}

void work(void *context, int thread) {
    Run &run = *static_cast<Run *>(context);
    const Call &call = run.call;
    const int64_t samples = call.steps[0].samples;
    const int64_t pieces = (call.count + samples - 1) / samples;
    if (call.together) {
        for (int64_t piece = 0; piece < pieces; ++piece)
            run_steps(run, run.arena, piece, run.team, thread);
    } else {
        Barrier alone(1);
        const Part own = share(pieces, thread, int(call.threads));
        for (int64_t piece = own.begin; piece < own.end; ++piece)
            run_steps(run, run.arena + thread * (call.activations + call.panel), piece, alone, 0);
    }
}

} // namespace

extern "C" {

int pruneflow_lanes() { return LANES; }
int pruneflow_registers() { return REGISTERS; }

int pruneflow_threads(int threads) {
    return !Pool::instance().run(threads, [](void *, int) {}, nullptr);
}

int pruneflow_run(const Call *call, const float *in, float *out, float *arena) {
    const int threads = int(call->threads);
    Run run{*call, in, out, arena, Barrier(threads)};
    return !Pool::instance().run(threads, work, &run);
}
}
