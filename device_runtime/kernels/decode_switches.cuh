// What variants of decode_attention.cu are compiled with: tests/gpu/tune_attention.py measures them.
#ifndef TURBOJET_DECODE_SWITCHES_CUH
#define TURBOJET_DECODE_SWITCHES_CUH

namespace {

// Of a block, each with a ring of its own; attention_shape.py DECODE_WARPS.
#ifndef TURBOJET_DECODE_WARPS
#define TURBOJET_DECODE_WARPS 8
#endif
constexpr int kStreamWarps = TURBOJET_DECODE_WARPS;
// When the next kernel may start: 0 at once, 1 when this one's copies have been asked for, which its
// loads would delay, 2 when the queries are there.
#ifndef TURBOJET_DECODE_TRIGGER
#define TURBOJET_DECODE_TRIGGER 1
#endif
constexpr int kTrigger = TURBOJET_DECODE_TRIGGER;
// Steps behind the ring that a warp asks into L2 while it waits for the kernel before.
#ifndef TURBOJET_DECODE_AHEAD
#define TURBOJET_DECODE_AHEAD 0
#endif
constexpr int kAheadSteps = TURBOJET_DECODE_AHEAD;
// Whether only those of them that not all warps have, of a split that does not divide evenly.
#ifndef TURBOJET_DECODE_ODD_AHEAD
#define TURBOJET_DECODE_ODD_AHEAD 0
#endif
constexpr bool kOddAhead = TURBOJET_DECODE_ODD_AHEAD != 0;
// Whether one lane asks for a whole part at once.
#ifndef TURBOJET_DECODE_BULK_AHEAD
#define TURBOJET_DECODE_BULK_AHEAD 0
#endif
constexpr bool kBulkAhead = TURBOJET_DECODE_BULK_AHEAD != 0;
#ifndef TURBOJET_DECODE_SLOTS
#define TURBOJET_DECODE_SLOTS 4
#endif
constexpr int kMostSlots = TURBOJET_DECODE_SLOTS;  // of a warp's ring

}  // namespace

#endif
