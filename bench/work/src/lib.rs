//! The loops that are measured, the same for every contender.
//!
//! A contender is a process of its own: so its memory, its system calls and its allocations are its alone, and one that
//! fails takes nobody with it. It takes commands on its standard input and answers on its standard output, one JSON
//! value a line ([`protocol`]). What it does between the clock's two readings is [`serve`]'s one loop, compiled for
//! each contender's [`Disk`].

pub mod buffer;
pub mod disk;
pub mod offsets;
pub mod probes;
pub mod protocol;
pub mod serve;

pub use disk::{Disk, Open};
