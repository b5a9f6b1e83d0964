//! The engine on devices in memory: some that do what they are told at once, and some that are slow, fail, and forget what was
//! not flushed when the power is cut. One program, since each would compile the engine again.
//!
//! With the feature `mutations` only the tests of the module of that name may run in one process: they break the library for all
//! of it.
#![allow(unreachable_pub, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

mod bitmaps;
mod check_open;
mod commit;
mod create;
mod data_file;
mod faults;
#[cfg(feature = "mutations")]
mod mutations;
mod power_cut;
mod random_operations;
mod snapshot_tables;
mod snapshots;
mod snapshots_made;
mod uncounted;
mod upgrade;
