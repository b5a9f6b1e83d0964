//! Writes that need new clusters, and flushes.

use anyhow::Result;
use bench_work::offsets::Offsets;
use bench_work::protocol::{Kind, Work};

use super::Bench;
use crate::contender::Contender::{self, Library, Qemu, Raw};
use crate::contender::Field;
use crate::counts;
use crate::figures::{Line, Spread, ratios};
use crate::place::{GIB, MIB, Place, Resident, STRETCH, Shape, occupied, opening};

/// Every stretch once, in random order: round after round others.
fn fresh(shape: &Shape, round: u64, each: u64) -> Offsets {
    Offsets::Shuffled { units: shape.stretches(), unit: STRETCH, within: 0, seed: 5, skip: round * each }
}

pub fn allocate(bench: &mut Bench) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    let scale = bench.scale;
    for (place, flush, target) in
        [(&bench.tmpfs, false, 1.15), (&bench.tmpfs, true, 1.10), (&bench.disk, false, 1.15), (&bench.disk, true, 1.10)]
    {
        let shape = Shape::empty(scale.size(4 * GIB), 64 << 10);
        shape.make(place, "allocate", &Contender::ALL)?;
        let mut field = Field::open(&Contender::ALL, |who| Ok(opening(&place.of(who, "allocate"))))?;
        // A filesystem on a disk has an extent for each write, and takes milliseconds to remove one.
        let (rounds, each) = if place.name == bench.disk.name { (8, 200) } else { (40, 1_000) };
        let rounds = scale.rounds().min(rounds);
        let each = each.min(shape.stretches() / rounds);
        let samples = field.rounds(rounds, true, |round| {
            let work = Work::new(Kind::Write, 4096, fresh(&shape, round, each), each);
            if flush { work.flush_at_end() } else { work }
        })?;
        field.close()?;
        let end = if flush { "then one flush" } else { "no flush" };
        let work = format!("4 KiB write into unallocated clusters, {end}, {}", place.name);
        lines.push(ratios("allocate", work, &samples).at_most(target));
        if flush && place.name == bench.disk.name {
            lines.push(disk_space(place, rounds * each)?);
        }
        place.clear()?;
    }
    lines.push(sequential(bench)?);
    Ok(lines)
}

/// What the files occupy for each 4 KiB that were written to them.
fn disk_space(place: &Place, writes: u64) -> Result<Line> {
    let mut line = Line::new("allocate", "disk space per byte written into unallocated clusters", "ratio");
    for who in Contender::ALL {
        let bytes = occupied(&place.of(who, "allocate"))? as f64;
        if who != Qemu && who.built() {
            line = line.value(who, Some(Spread::exact(bytes / (writes * 4096) as f64)));
        }
    }
    Ok(line.at_most(1.25))
}

fn sequential(bench: &Bench) -> Result<Line> {
    let (scale, place) = (bench.scale, &bench.tmpfs);
    let shape = Shape::empty(scale.size(GIB), 64 << 10);
    shape.make(place, "fill", &Contender::ALL)?;
    let mut field = Field::open(&Contender::ALL, |who| Ok(opening(&place.of(who, "fill"))))?;
    let rounds = scale.rounds().min(50);
    let each = scale.pick(20, 10).min(shape.size / MIB / rounds).max(1);
    let samples = field.rounds(rounds, true, |round| {
        let offsets = Offsets::Sequential { units: shape.size / MIB, unit: MIB, skip: round * each };
        Work::new(Kind::Write, MIB as usize, offsets, each)
    })?;
    field.close()?;
    let work = format!("1 MiB sequential write into unallocated clusters, {}", place.name);
    Ok(ratios("allocate", work, &samples).at_most(1.05))
}

/// A database in the guest: a flush after every write.
pub fn flush(bench: &mut Bench) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    let (scale, place) = (bench.scale, &bench.disk);
    for (mapped, verb, target) in [(true, "overwrite", 1.0), (false, "write into an unallocated cluster", 2.0)] {
        let size = scale.size(256 * MIB);
        let shape = if mapped { Shape::mapped(size, 64 << 10, Resident::All) } else { Shape::empty(size, 64 << 10) };
        shape.make(place, "flush", &Contender::ALL)?;
        let each = scale.pick(10, 20);
        let within = if mapped { crate::place::WITHIN } else { 0 };
        let work = |round: u64| {
            let skip = round * each;
            let offsets = Offsets::Shuffled { units: shape.stretches(), unit: STRETCH, within, seed: 9, skip };
            Work::new(Kind::Write, 4096, offsets, each).flush_every(1)
        };
        let mut field = Field::open(&Contender::ALL, |who| Ok(opening(&place.of(who, "flush"))))?;
        let samples = field.rounds(scale.rounds().min(30), false, work)?;
        field.close()?;
        lines.push(ratios("flush", format!("4 KiB {verb}, flush, {}", place.name), &samples));

        let mut flushes =
            Line::new("flush", format!("4 KiB {verb}, flush: flushes of the device"), "per flush").at_most(target);
        let mut bytes = Line::new("flush", format!("4 KiB {verb}, flush: bytes written per byte"), "ratio");
        let mut calls = Line::new("flush", format!("4 KiB {verb}, flush: system calls"), "per operation");
        let who = [Raw, Library, Contender::Qcow2Rs, Contender::ImagoSync];
        for who in who.into_iter().filter(|who| who.built()) {
            // Rounds that nobody has done yet; long enough that the first flush, which marks the image, weighs little.
            let work = Work { count: 300, ..work(scale.rounds() + 1) };
            let counted = counts::calls(who, &opening(&place.of(who, "flush")), &work, &bench.tmpfs.path("trace"))?;
            let each = |count: u64| Some(Spread::exact(count as f64 / work.count as f64));
            flushes = flushes.value(who, each(counted.flushes()));
            calls = calls.value(who, each(counted.total()));
            bytes = bytes.value(who, Some(Spread::exact(counted.written as f64 / (work.count * 4096) as f64)));
        }
        lines.extend([flushes, calls, bytes]);
        place.clear()?;
    }
    Ok(lines)
}
