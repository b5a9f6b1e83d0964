//! A filesystem of another kind, in a file: for root only.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::place::{Place, sparse};
use crate::qemu::run;

/// Unmounted when it is dropped.
pub struct Loopback {
    pub mounted: PathBuf,
    file: PathBuf,
}

impl Loopback {
    pub fn xfs(place: &Place, size: u64) -> Result<Self> {
        let (file, mounted) = (place.path("xfs.img"), place.path("xfs"));
        sparse(&file, size)?;
        run(Command::new("mkfs.xfs").args(["-q", "-m", "reflink=1"]).arg(&file))?;
        fs::create_dir(&mounted)?;
        run(Command::new("mount").args(["-o", "loop"]).arg(&file).arg(&mounted))?;
        Ok(Self { mounted, file })
    }
}

impl Drop for Loopback {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.mounted).status();
        let _ = fs::remove_dir(&self.mounted);
        let _ = fs::remove_file(&self.file);
    }
}
