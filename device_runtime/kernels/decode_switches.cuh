// What variants of decode_attention.cu are compiled with: tests/gpu/tune_attention.py measures them.
#ifndef TURBOJET_DECODE_SWITCHES_CUH
#define TURBOJET_DECODE_SWITCHES_CUH

namespace {

// When the next kernel may start: 0 at once, 1 when this one's copies have been asked for, which its
// loads would delay, 2 when the queries are there.
#ifndef TURBOJET_DECODE_TRIGGER
#define TURBOJET_DECODE_TRIGGER 0
#endif
constexpr int kTrigger = TURBOJET_DECODE_TRIGGER;
// Parts of an int8 step that are asked for before the kernel before has finished. The query's loads
// queue up behind them, so the ring's last part comes after those.
#ifndef TURBOJET_DECODE_EARLY_PARTS
#define TURBOJET_DECODE_EARLY_PARTS 3
#endif
constexpr int kEarlyParts = TURBOJET_DECODE_EARLY_PARTS;

}  // namespace

#endif
