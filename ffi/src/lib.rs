//! The C interface of libqcowrecycle: `qcr_*` functions over [`qcow_recycler::blocking::Disk`].
//!
//! `include/qcowrecycle.h` is generated from these sources by `ffi/header`: every public type and function here is
//! part of the ABI, and its comment is the C programmer's manual. Each public module is a section of the header,
//! and its comment the section's introduction.
//!
//! Nothing here keeps state of its own: no globals, nothing per thread. A function checks its arguments, crosses
//! the one panic boundary (`boundary`), and calls the core.
#![allow(non_camel_case_types)]
// The rules for every pointer of every function stand once, at the top of the header.
#![allow(clippy::missing_safety_doc)]

#[cfg(panic = "abort")]
compile_error!("panics must unwind: the library promises to contain them");

mod abi;
mod boundary;
mod device;
mod verbs;

pub mod bitmaps;
pub mod callbacks;
pub mod create;
pub mod data;
pub mod error;
pub mod image;
pub mod inspect;
pub mod offline;
pub mod options;
pub mod queue;
pub mod recycle;
pub mod snapshots;
pub mod submit;
pub mod version;

#[cfg(feature = "test-hooks")]
pub mod hooks;

#[cfg(test)]
mod layout;
