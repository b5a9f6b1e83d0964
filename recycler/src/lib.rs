//! A qcow2 block driver that keeps the image file as small as its live data while the virtual machine runs.
#![deny(unsafe_code)]

pub mod blocking;
pub mod buf;
pub mod check;
mod clusters;
mod crypto;
pub mod device;
pub mod error;
pub mod format;
pub mod image;
mod metadata;
#[cfg(test)]
mod models;
#[cfg(test)]
extern crate self as qcow_recycler;
pub mod mutation;
pub mod options;
pub mod passphrase;
pub mod queue;
pub mod recycler;
pub mod stats;
mod sync;
pub mod units;

pub use blocking::Disk;
pub use check::{CheckReport, Repair};
pub use device::BlockDevice;
pub use error::{Error, Result};
pub use image::{
    BackingFile, BitmapInfo, CreateOptions, DataFileOptions, Extent, ExtentKind, Image, Info, SnapshotInfo,
};
pub use options::{BackingFormat, BackingPolicy, DataFilePolicy, LogLevel, Logger, Options};
pub use passphrase::Passphrase;
pub use stats::Stats;
