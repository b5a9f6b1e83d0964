//! Compaction of a file half of whose clusters are free, at random, beside the least that anybody must do for it.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bench_work::offsets::Offsets;
use bench_work::protocol::{Bound, Extra, Kind, Work};
use serde_json::Value;

use super::Bench;
use crate::contender::Contender::{Library, Qemu, Raw};
use crate::contender::Process;
use crate::counts;
use crate::figures::{Line, Spread};
use crate::loopback::Loopback;
use crate::place::{GIB, MIB, Place, Resident, STRETCH, Shape, copy, drop_from_cache, occupied, opening};
use crate::qemu;

/// Less than so many MiB is no space worth the name: filesystems count their own extent trees, too.
const LITTLE: f64 = 1.0;

/// An image as it is before it is compacted, and what compacting it takes at least.
struct Fragmented {
    image: PathBuf,
    /// Host clusters that are free.
    free: Vec<u64>,
    bound: Bound,
}

impl Fragmented {
    fn make(place: &Place, size: u64) -> Result<Self> {
        let shape = Shape::mapped(size, STRETCH, Resident::All);
        shape.make(place, "before", &[Library])?;
        let image = place.of(Library, "before");
        let full = qemu::map(&image)?;
        let units = shape.stretches();
        let mut process = Process::open(Library, &opening(&image))?;
        let offsets = Offsets::Shuffled { units, unit: STRETCH, within: 0, seed: 3, skip: 0 };
        process.run(&Work::new(Kind::Discard, STRETCH as usize, offsets, units / 2))?;
        process.close()?;
        let used = clusters(&qemu::map(&image)?);
        let mut free = clusters(&full);
        free.retain(|cluster| used.binary_search(cluster).is_err());
        let bound = bound(&used, &free, fs::metadata(&image)?.len());
        Ok(Self { image, free, bound })
    }

    /// A fresh copy, durable, in the page cache or not.
    fn copy(&self, to: &Path, cold: bool) -> Result<()> {
        copy(&self.image, to)?;
        qemu::run(Command::new("sync").arg(to))?;
        if cold { drop_from_cache(to) } else { Ok(()) }
    }
}

/// The clusters of the image, in the order in which they lie in the file.
fn clusters(extents: &[qemu::Extent]) -> Vec<u64> {
    let each = |extent: &qemu::Extent| (extent.offset..extent.offset + extent.length).step_by(STRETCH as usize);
    let mut clusters: Vec<u64> = extents.iter().flat_map(each).collect();
    clusters.sort_unstable();
    clusters
}

/// The last clusters in use into the first free ones, in ascending order, neighbours together.
fn bound(used: &[u64], free: &[u64], length: u64) -> Bound {
    let length = length - free.len() as u64 * STRETCH;
    let from = used.iter().filter(|&&cluster| cluster >= length);
    let to = free.iter().filter(|&&cluster| cluster < length);
    let mut copies: Vec<(u64, u64, u64)> = Vec::new();
    for (&from, &to) in from.zip(to) {
        match copies.last_mut() {
            Some((a, b, length)) if *a + *length == from && *b + *length == to => *length += STRETCH,
            _ => copies.push((from, to, STRETCH)),
        }
    }
    Bound { copies, length, share: false }
}

fn seconds(report: &Value) -> Result<f64> {
    Ok(report["nanoseconds"].as_u64().context("a report without a time")? as f64 / 1e9)
}

/// Compacts, and tells how much more of the disk the file occupied meanwhile than before.
fn compact_and_watch(image: &Path) -> Result<(Value, u64)> {
    let before = occupied(image)?;
    let (peak, done) = (AtomicU64::new(before), AtomicBool::new(false));
    let report = std::thread::scope(|scope| -> Result<Value> {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                peak.fetch_max(occupied(image).unwrap_or(0), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        let compacted = || -> Result<Value> {
            let mut process = Process::open(Library, &opening(image))?;
            let report = process.extra(Extra::Compact(None))?;
            process.close()?;
            Ok(report)
        }();
        done.store(true, Ordering::Relaxed);
        compacted
    })?;
    Ok((report, peak.load(Ordering::Relaxed) - before))
}

pub fn compact(bench: &mut Bench) -> Result<Vec<Line>> {
    let scale = bench.scale;
    let mut lines = Vec::new();
    let size = scale.size(scale.pick(512 * MIB, 4 * GIB));
    // Even numbers: who comes first in a round, after files of some GiB have been copied, may be at an advantage or not.
    let rounds = |place: &Place| if place.name == bench.disk.name { scale.pick(2, 4) } else { scale.pick(4, 6) };
    for (place, cold) in [(&bench.tmpfs, false), (&bench.disk, false), (&bench.disk, true)] {
        let fragmented = Fragmented::make(place, size)?;
        let heat = if cold { "cold" } else { "warm" };
        let work = format!("compaction, {} MiB half free at random, {heat}, {}", size / MIB, place.name);
        lines.extend(measure(place, &fragmented, &work, rounds(place), cold, Sharing::No)?);
        if place.name == bench.tmpfs.name {
            lines.push(calls(place, &fragmented)?);
        }
        if !cold {
            lines.push(punched(place, &fragmented)?);
        }
        if cold {
            lines.extend(order(place, &fragmented)?);
        }
        place.clear()?;
    }
    match Loopback::xfs(&bench.disk, size * 4 + GIB) {
        Ok(loopback) => {
            let place = Place::new(&loopback.mounted)?;
            let fragmented = Fragmented::make(&place, size)?;
            let work = format!("compaction, {} MiB half free at random, sharing extents, {}", size / MIB, place.name);
            lines.extend(measure(&place, &fragmented, &work, rounds(&place), false, Sharing::Yes)?);
        }
        Err(error) => eprintln!("  without XFS: {error:#}"),
    }
    Ok(lines)
}

#[derive(Clone, Copy, PartialEq)]
enum Sharing {
    No,
    Yes,
}

fn measure(
    place: &Place,
    fragmented: &Fragmented,
    work: &str,
    rounds: u64,
    cold: bool,
    sharing: Sharing,
) -> Result<Vec<Line>> {
    let (ours, lower, converted) = (place.path("ours"), place.path("bound"), place.path("converted"));
    let (mut ratios, mut convert, mut spaces, mut raw, mut flushes) = (vec![], vec![], vec![], vec![], vec![]);
    let mut spaces_of_convert = vec![];
    let bound = Bound { share: sharing == Sharing::Yes, ..fragmented.bound.clone() };
    for round in 0..rounds {
        let mut library = || -> Result<f64> {
            fragmented.copy(&ours, cold)?;
            let (report, extra) = compact_and_watch(&ours)?;
            qemu::check(&ours)?;
            spaces.push(extra as f64 / MIB as f64);
            let moved = report["moved"].as_u64().unwrap_or(0).max(1) as f64 / (64 * MIB) as f64;
            flushes.push(report["flushes"].as_u64().unwrap_or(0) as f64 / moved.max(1.0));
            seconds(&report)
        };
        let least = || -> Result<f64> {
            fragmented.copy(&lower, cold)?;
            let mut process = Process::open(Raw, &opening(&lower))?;
            let report = process.extra(Extra::Compact(Some(bound.clone())))?;
            process.close()?;
            seconds(&report)
        };
        // Turn and turn about.
        let (library, least) = if round % 2 == 0 {
            let library = library()?;
            (library, least()?)
        } else {
            let least = least()?;
            (library()?, least)
        };
        ratios.push(library / least);
        raw.push(least * 1e6);

        fragmented.copy(&ours, cold)?;
        let started = Instant::now();
        let mut command = qemu::qemu_img();
        command.args(["convert", "-f", "qcow2", "-O", "qcow2"]);
        if sharing == Sharing::Yes {
            command.arg("-C");
        }
        qemu::run(command.arg(&ours).arg(&converted))?;
        qemu::run(Command::new("sync").arg(&converted))?;
        convert.push(started.elapsed().as_secs_f64() / least);
        spaces_of_convert.push(occupied(&converted)? as f64 / MIB as f64);
        for file in [&ours, &lower, &converted] {
            fs::remove_file(file)?;
        }
    }
    let mut time = Line::new("compact", work, "× bound")
        .value(Library, Spread::of(ratios))
        .value(Qemu, Spread::of(convert))
        .at_most(if sharing == Sharing::Yes { 1.3 } else { 1.15 });
    time.raw_microseconds = Spread::of(raw).map(|spread| spread.median);
    let space = Line::new("compact", format!("{work}: extra space"), "MiB")
        .value(Library, Spread::of(spaces))
        .value(Qemu, Spread::of(spaces_of_convert))
        .at_most(LITTLE);
    let flushes = Line::new("compact", format!("{work}: flushes"), "per 64 MiB").value(Library, Spread::of(flushes));
    Ok(vec![time, space, flushes.at_most(2.0)])
}

/// System calls of a compaction, and how many clusters were moved more than once.
fn calls(place: &Place, fragmented: &Fragmented) -> Result<Line> {
    let image = place.path("counted");
    fragmented.copy(&image, false)?;
    let calls = counts::calls_of_compaction(&opening(&image), &place.path("trace"))?;
    let bytes: u64 = fragmented.bound.copies.iter().map(|(_, _, length)| length).sum();
    let ratio = calls.total() as f64 / (2 * fragmented.bound.copies.len()) as f64;
    eprintln!("  {} calls for {} MiB: {:?}", calls.total(), bytes / MIB, calls.by_name);
    Ok(Line::new("compact", "compaction: system calls over those of the bound", "ratio").library(ratio))
}

/// A guest's discards may have been punched: then each move takes space before it gives any back.
fn punched(place: &Place, fragmented: &Fragmented) -> Result<Line> {
    let image = place.path("punched");
    fragmented.copy(&image, false)?;
    let file = OpenOptions::new().write(true).open(&image)?;
    for &cluster in &fragmented.free {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: no memory is involved.
        if unsafe { libc::fallocate(file.as_raw_fd(), mode, cluster as i64, STRETCH as i64) } != 0 {
            return Err(io::Error::last_os_error().into());
        }
    }
    let (_, extra) = compact_and_watch(&image)?;
    qemu::check(&image)?;
    let work = format!("compaction, all holes punched, {}: extra space", place.name);
    Ok(Line::new("compact", work, "MiB").library(extra as f64 / MIB as f64).at_most(LITTLE))
}

/// What compaction does to the order of the clusters.
fn order(place: &Place, fragmented: &Fragmented) -> Result<Vec<Line>> {
    let image = place.path("ordered");
    fragmented.copy(&image, true)?;
    let size = fragmented.bound.length;
    let read = || -> Result<f64> {
        drop_from_cache(&image)?;
        let mut process = Process::open(Library, &opening(&image))?;
        let offsets = Offsets::Sequential { units: size / MIB, unit: MIB, skip: 0 };
        let done = process.run(&Work::new(Kind::Read, MIB as usize, offsets, size / MIB))?;
        process.close()?;
        Ok(done.nanoseconds as f64)
    };
    // The better of two: the disk is not ours alone.
    let read = || -> Result<f64> { Ok(read()?.min(read()?)) };
    let (before, runs_before) = (read()?, qemu::map(&image)?.len() as f64);
    let mut process = Process::open(Library, &opening(&image))?;
    process.extra(Extra::Compact(None))?;
    process.close()?;
    let (after, runs_after) = (read()?, qemu::map(&image)?.len() as f64);
    Ok(vec![
        Line::new("compact", format!("sequential read, after over before compaction, cold, {}", place.name), "speed")
            .library(before / after)
            .at_least(0.95),
        Line::new("compact", "runs of guest clusters, after over before compaction", "ratio")
            .library(runs_after / runs_before)
            .at_most(1.0),
    ])
}
