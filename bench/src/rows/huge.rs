//! A disk of 1 TiB with all its tables allocated; and a disk that nobody uses.

use std::time::Instant;

use anyhow::{Context, Result};
use bench_work::offsets::Offsets;
use bench_work::protocol::{Extra, Kind, Opening, Work};

use super::Bench;
use crate::contender::Contender::{self, Library, Raw};
use crate::contender::Process;
use crate::figures::{Line, Spread};
use crate::place::{GIB, MIB, Resident, STRETCH, Shape, copy, opening};
use crate::qemu;

const CONTENDERS: [Contender; 4] = [Raw, Library, Contender::Qcow2Rs, Contender::ImagoSync];

pub fn huge(bench: &mut Bench) -> Result<Vec<Line>> {
    let (scale, place) = (bench.scale, &bench.tmpfs);
    let shape = Shape::mapped(scale.size(1024 * GIB), STRETCH, Resident::Nothing);
    shape.make(place, "huge", &CONTENDERS)?;
    let mut opened = Line::new("huge", "open a disk of 1 TiB, warm", "ms").at_most(1.0);
    let mut idle = Line::new("huge", "open a disk of 1 TiB: memory over the raw file's", "MiB").at_most(8.0);
    let mut raw = 0;
    for who in CONTENDERS.into_iter().filter(|who| who.built()) {
        let opening = opening(&place.of(who, "huge"));
        let mut times = Vec::new();
        for _ in 0..scale.pick(7, 15) {
            let process = Process::open(who, &opening)?;
            times.push(process.opened as f64 / 1e6);
            process.close()?;
        }
        opened = opened.value(who, Spread::of(times));
        let mut process = Process::open(who, &opening)?;
        let resident = process.memory()?.resident;
        process.close()?;
        if who == Raw {
            raw = resident;
        }
        let over = resident.saturating_sub(raw) as f64 / MIB as f64;
        idle = idle.value(who, Some(Spread::exact(over)));
    }
    idle.values.remove(&Raw);
    let mut lines = vec![opened, idle];
    lines.extend(compact(bench, &shape)?);
    Ok(lines)
}

/// Frees clusters at random and moves as many from the end; then a few only, which is looking for them and little else.
fn compact(bench: &Bench, shape: &Shape) -> Result<Vec<Line>> {
    let (scale, place) = (bench.scale, &bench.tmpfs);
    let image = place.of(Library, "huge");
    let started = Instant::now();
    qemu::check(&image)?;
    let check = started.elapsed().as_secs_f64();
    let spare = place.path("spare");
    copy(&image, &spare)?;
    let free_and_compact = |path: &std::path::Path, count: u64| -> Result<(f64, f64)> {
        let mut process = Process::open(Library, &opening(path))?;
        let units = shape.stretches();
        let offsets = Offsets::Random { units: units / 2, unit: STRETCH, within: 0, seed: 3 };
        process.run(&Work::new(Kind::Discard, STRETCH as usize, offsets, count))?;
        process.flush()?;
        let before = process.memory()?.resident;
        let report = process.extra(Extra::Compact(None))?;
        let peak = process.memory()?.peak;
        process.close()?;
        let nanoseconds = report["nanoseconds"].as_u64().context("a report without a time")?;
        Ok((nanoseconds as f64 / 1e9, peak.saturating_sub(before) as f64 / MIB as f64))
    };
    let (seconds, memory) = free_and_compact(&image, scale.size(scale.pick(256 * MIB, GIB)) / STRETCH)?;
    qemu::check(&image)?;
    let (scan, _) = free_and_compact(&spare, 16)?;
    let moved = scale.size(scale.pick(256 * MIB, GIB)) / MIB;
    Ok(vec![
        Line::new("huge", format!("plan and compact {moved} MiB of 1 TiB: memory"), "MiB")
            .library(memory)
            .at_most(24.0),
        Line::new("huge", format!("plan and compact {moved} MiB of 1 TiB"), "s").library(seconds),
        Line::new("huge", "find and move 16 clusters of 1 TiB, over qemu-img check", "ratio")
            .library(scan / check)
            .at_most(1.0),
    ])
}

/// Wake-ups of the library's threads while there is nothing to do, the recycler running.
pub fn idle(bench: &mut Bench) -> Result<Vec<Line>> {
    let place = &bench.tmpfs;
    let shape = Shape::mapped(64 * MIB, STRETCH, Resident::Nothing);
    shape.make(place, "idle", &[Library])?;
    let config = "settle_ms=100;flush_ms=100".to_owned();
    let mut process = Process::open(Library, &Opening { config, ..opening(&place.of(Library, "idle")) })?;
    process.extra(Extra::Start)?;
    let offsets = Offsets::Sequential { units: 64, unit: STRETCH, skip: 0 };
    process.run(&Work::new(Kind::Write, 4096, offsets, 64))?;
    process.flush()?;
    process.extra(Extra::Idle { milliseconds: 1_500 })?;
    let milliseconds = bench.scale.pick(3_000, 10_000);
    let woken = process.extra(Extra::Idle { milliseconds })?.as_u64().context("not a number")?;
    process.close()?;
    let line = Line::new("idle", "wake-ups while nothing happens, recycler running", "per second");
    Ok(vec![line.library(woken as f64 * 1000.0 / milliseconds as f64).at_most(0.0)])
}
