//! Requests to clusters that have their place in the file: only the data is transferred.

use anyhow::Result;
use bench_work::offsets::Offsets;
use bench_work::protocol::{Kind, Opening, Work};

use super::Bench;
use crate::contender::Contender::{self, Library, Qemu, Raw};
use crate::contender::{Field, Samples, add};
use crate::counts;
use crate::figures::{Line, Spread, ratios};
use crate::place::{GIB, MIB, Place, Resident, STRETCH, Shape, WITHIN, opening};

pub fn read(bench: &mut Bench) -> Result<Vec<Line>> {
    random(bench, "read", Kind::Read, 1.05, 250.0)
}

pub fn overwrite(bench: &mut Bench) -> Result<Vec<Line>> {
    random(bench, "overwrite", Kind::Write, 1.06, 300.0)
}

fn anywhere(shape: &Shape, seed: u64) -> Offsets {
    Offsets::Random { units: shape.stretches(), unit: STRETCH, within: WITHIN, seed }
}

fn random(bench: &mut Bench, row: &str, kind: Kind, target: f64, instructions: f64) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    let scale = bench.scale;
    let verb = if kind == Kind::Read { "read" } else { "overwrite" };
    let sizes = [(64 << 10, 4 * GIB), (4 << 10, GIB), (2 * MIB, 4 * GIB)];
    let on_disk = [(64 << 10, scale.pick(256, 1024) * MIB)];
    for (place, sizes, resident) in
        [(&bench.tmpfs, &sizes[..], Resident::Blocks), (&bench.disk, &on_disk[..], Resident::All)]
    {
        for &(cluster, size) in sizes {
            let shape = Shape::mapped(scale.size(size), cluster, resident);
            let count = scale.pick(2_000, 2_500);
            let rounds = if cluster == 64 << 10 { scale.rounds() } else { scale.rounds() / 2 };
            let (mut samples, mut peaks) = (Samples::new(), Vec::new());
            for set in 0..scale.sets() {
                place.clear()?;
                // QEMU has to be started for every round, so once is enough.
                let contenders: Vec<_> = Contender::ALL.into_iter().filter(|&who| set == 0 || who != Qemu).collect();
                shape.make(place, row, &contenders)?;
                let mut field = Field::open(&contenders, |who| Ok(opening(&place.of(who, row))))?;
                let some = field.rounds(rounds.div_ceil(scale.sets()), false, |round| {
                    Work::new(kind, 4096, anywhere(&shape, set << 32 | round), count).warm(500)
                })?;
                add(&mut samples, some);
                peaks = field.peaks()?;
                field.close()?;
            }
            let work = format!("random 4 KiB {verb}, {} KiB clusters, {}", cluster >> 10, place.name);
            lines.push(ratios(row, &work, &samples).at_most(target));
            if cluster == 64 << 10 && place.name == bench.tmpfs.name {
                let work = Work::new(kind, 4096, anywhere(&shape, 7), scale.pick(5_000, 10_000)).warm(1_000);
                lines.push(memory(row, verb, &peaks));
                lines.extend(counted(row, verb, place, &work, instructions)?);
            }
            place.clear()?;
        }
    }
    Ok(lines)
}

/// The most memory resident, over that of the raw file's process.
fn memory(row: &str, verb: &str, peaks: &[(Contender, u64)]) -> Line {
    let raw = peaks.iter().find(|(who, _)| *who == Raw).map_or(0, |(_, peak)| *peak);
    let mut line = Line::new(row, format!("random 4 KiB {verb}: peak memory over the raw file's"), "MiB");
    for &(who, peak) in peaks.iter().filter(|(who, _)| *who != Raw) {
        line = line.value(who, Some(Spread::exact(peak.saturating_sub(raw) as f64 / MIB as f64)));
    }
    line
}

/// What does not depend on the time of day, for each contender that runs in a process of ours.
fn counted(row: &str, verb: &str, place: &Place, work: &Work, most: f64) -> Result<Vec<Line>> {
    let title = |what: &str| format!("random 4 KiB {verb}: {what}");
    let mut calls = Line::new(row, title("system calls"), "per operation").at_most(1.0);
    let mut heap = Line::new(row, title("heap allocations"), "per operation").at_most(0.0);
    let mut instructions =
        Line::new(row, title("user instructions over the raw loop's"), "per operation").at_most(most);
    let mut bytes = Line::new(row, title("bytes written per byte"), "ratio");
    let mut raw = 0.0;
    let who = [Raw, Library, Contender::Qcow2Rs, Contender::ImagoSync, Contender::ImagoAsync];
    for who in who.into_iter().filter(|who| who.built()) {
        let opening = opening(&place.of(who, row));
        let traced = counts::calls(who, &opening, work, &place.path("trace"))?;
        calls = calls.value(who, Some(Spread::exact(traced.total() as f64 / work.count as f64)));
        if work.kind == Kind::Write {
            let ratio = traced.written as f64 / (work.count * work.size as u64) as f64;
            bytes = bytes.value(who, Some(Spread::exact(ratio)));
        }
        heap = heap.value(who, Some(Spread::exact(counts::allocations(who, &opening, work)?)));
        let executed = counts::instructions(who, &opening, work, &place.path("count"))?;
        if who == Raw {
            raw = executed;
        } else {
            instructions = instructions.value(who, Some(Spread::exact(executed - raw)));
        }
    }
    let mut lines = vec![instructions, calls, heap];
    if work.kind == Kind::Write {
        lines.push(bytes.at_most(1.0));
    }
    Ok(lines)
}

/// Two threads; who cannot share a disk opens it twice, which works for data that is mapped already.
pub fn threads(bench: &mut Bench) -> Result<Vec<Line>> {
    let contenders = [Raw, Library, Contender::Qcow2Rs, Contender::ImagoSync, Contender::ImagoAsync];
    let (scale, place) = (bench.scale, &bench.tmpfs);
    let shape = Shape::mapped(scale.size(4 * GIB), 64 << 10, Resident::Blocks);
    shape.make(place, "threads", &contenders)?;
    let mut field = Field::open(&contenders, |who| Ok(Opening { threads: 2, ..opening(&place.of(who, "threads")) }))?;
    let mut lines = Vec::new();
    for (kind, verb) in [(Kind::Read, "read"), (Kind::Write, "overwrite")] {
        let count = scale.pick(2_000, 2_500);
        let samples = field
            .rounds(scale.rounds(), false, |round| Work::new(kind, 4096, anywhere(&shape, round), count).warm(500))?;
        let work = format!("random 4 KiB {verb}, 2 threads, one handle, {}", place.name);
        lines.push(ratios("threads", work, &samples).at_most(1.08));
    }
    field.close()?;
    Ok(lines)
}

pub fn sequential(bench: &mut Bench) -> Result<Vec<Line>> {
    let (scale, place) = (bench.scale, &bench.tmpfs);
    let size = scale.size(512 * MIB);
    let shape = Shape::mapped(size, 64 << 10, Resident::All);
    shape.make(place, "sequential", &Contender::ALL)?;
    let mut field = Field::open(&Contender::ALL, |who| Ok(opening(&place.of(who, "sequential"))))?;
    let mut lines = Vec::new();
    for (kind, verb) in [(Kind::Read, "read"), (Kind::Write, "write")] {
        for unit in [64 << 10, MIB] {
            let count = scale.size(32 * MIB) / unit;
            let samples = field.rounds(scale.rounds(), false, |round| {
                let offsets = Offsets::Sequential { units: size / unit, unit, skip: round * count };
                Work::new(kind, unit as usize, offsets, count).warm(1)
            })?;
            let work = format!("sequential {verb} of {} KiB, mapped, {}", unit >> 10, place.name);
            lines.push(ratios("sequential", work, &samples).at_most(1.02));
        }
    }
    field.close()?;
    Ok(lines)
}
