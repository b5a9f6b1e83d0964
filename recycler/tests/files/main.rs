//! The library on files of the host, and on images that QEMU made.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../simulation/common/slice.rs"]
mod slice;

mod check;
mod header;
mod host_file;
mod queue;
mod space;
