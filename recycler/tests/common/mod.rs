//! Machinery that the simulation tests share. Each test program uses a part of it.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod chain;
pub mod config;
pub mod content;
pub mod crash;
pub mod cuts;
pub mod directed;
pub mod disturb;
pub mod encryption;
pub mod guests;
pub mod history;
pub mod memory;
pub mod model;
pub mod play;
pub mod sequences;
pub mod sim;
pub mod slice;
pub mod snapshots;
pub mod taken;
pub mod verify;
