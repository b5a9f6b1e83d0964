//! What QEMU's own program measures and makes.

use std::path::Path;
use std::process::{Command, Output};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use bench_work::offsets::Offsets;
use bench_work::protocol::{Done, Kind, Work};
use serde::Deserialize;

/// Runs a program, and fails with what it printed unless it succeeds.
pub fn run(command: &mut Command) -> Result<Output> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(output)
}

pub fn qemu_img() -> Command {
    Command::new("qemu-img")
}

/// A new image; `options` as of `qemu-img create -o`.
pub fn create(path: &Path, size: u64, options: &str) -> Result<()> {
    let mut command = qemu_img();
    command.args(["create", "-q", "-f", "qcow2"]);
    if !options.is_empty() {
        command.args(["-o", options]);
    }
    run(command.arg(path).arg(size.to_string())).map(drop)
}

/// `qemu-img bench`, what it takes to start subtracted: the difference of two counts. It walks through the image in equal
/// steps, so random work becomes steps of a large prime number of units.
/// `seen` units have been worked on already; the next follow.
pub fn bench(image: &Path, direct: bool, work: &Work, seen: &mut u64) -> Result<Option<Done>> {
    let (units, unit, within, step) = match work.offsets {
        Offsets::Random { units, unit, within, .. } | Offsets::Shuffled { units, unit, within, .. } => {
            (units, unit, within, 4099)
        }
        Offsets::Sequential { units, unit, .. } | Offsets::AmongLast { units, unit, .. } => (units, unit, 0, 1),
    };
    // Enough to tell apart from starting.
    let many = match (work.flush_every, work.size) {
        (0, ..0x10000) => work.count.clamp(200, 3000),
        (0, _) => work.count.clamp(20, 200),
        _ => work.count.clamp(10, 100),
    };
    let few = many / 10;
    let mut once = |count: u64| -> Result<u64> {
        let start = *seen * step % units * unit + within;
        *seen += count;
        let mut command = qemu_img();
        command.args([
            "bench",
            "-f",
            "qcow2",
            "-t",
            if direct { "none" } else { "writeback" },
            "-s",
            &work.size.to_string(),
        ]);
        command.args(["-c", &count.to_string(), "-d", &work.depth.max(1).to_string()]);
        command.args(["-o", &start.to_string(), "-S", &(step * unit).to_string()]);
        if work.depth > 1 {
            command.args(["-i", "io_uring"]);
        }
        if work.kind == Kind::Write {
            command.arg("-w");
            if work.flush_every > 0 {
                command.args(["--flush-interval", &work.flush_every.to_string()]);
            }
        }
        let started = Instant::now();
        run(command.arg(image))?;
        Ok(started.elapsed().as_nanos() as u64)
    };
    let (short, long) = (once(few)?, once(many)?);
    // On a busy machine the shorter run may take longer: that says nothing.
    let nanoseconds = long.checked_sub(short);
    Ok(nanoseconds.map(|nanoseconds| Done { nanoseconds, operations: many - few, ..Done::default() }))
}

/// A range of the disk that has its place in the file.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Extent {
    pub length: u64,
    pub offset: u64,
}

/// All of them, by place on the disk.
pub fn map(image: &Path) -> Result<Vec<Extent>> {
    let output = run(qemu_img().args(["map", "--output=json", "-f", "qcow2"]).arg(image))?;
    let all: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout)?;
    let stored = all.into_iter().filter(|extent| extent["data"] == true && extent["offset"].is_u64());
    stored.map(|extent| Ok(serde_json::from_value(extent)?)).collect()
}

/// Fails unless `qemu-img check` finds neither corruption nor leaks.
pub fn check(image: &Path) -> Result<()> {
    run(qemu_img().args(["check", "-q", "-f", "qcow2"]).arg(image)).map(drop)
}
