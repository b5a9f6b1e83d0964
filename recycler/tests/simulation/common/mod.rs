//! Machinery that the tests share.

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
mod sim_tests;
pub mod slice;
pub mod slow;
pub mod snapshots;
pub mod taken;
pub mod verify;
