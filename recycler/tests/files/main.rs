//! The library on files of the host, and on images that QEMU made.
#![allow(unreachable_pub, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[allow(dead_code)]
#[path = "../simulation/common/slice.rs"]
mod slice;

mod check;
mod header;
mod host_file;
mod length;
mod own_tables;
mod queue;
mod search;
mod space;
