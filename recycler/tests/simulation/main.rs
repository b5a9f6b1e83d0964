//! The engine on devices in memory: some that do what they are told at once, and some that are slow, fail, and forget what was
//! not flushed when the power is cut. One program, since each would compile the engine again.
//!
//! The tests of `mutations` are ignored unless they are asked for: they break the library for the whole process.
#![allow(unreachable_pub, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

mod bitmaps;
mod check_open;
mod commit;
mod create;
mod data_file;
mod faults;
mod full;
mod mutations;
mod power_cut;
mod random_operations;
mod resize;
mod snapshot_tables;
mod snapshots;
mod snapshots_made;
mod uncounted;
mod upgrade;
