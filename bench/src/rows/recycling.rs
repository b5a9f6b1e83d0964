//! What the guest notices of the recycler at work.

use anyhow::Result;
use bench_work::offsets::Offsets;
use bench_work::protocol::{Done, Extra, Kind, Opening, Work};

use super::Bench;
use crate::contender::Contender::{Library, Raw};
use crate::contender::{Field, Process, Samples};
use crate::figures::{Line, Spread, ratios, undisturbed};
use crate::place::{GIB, MIB, Resident, STRETCH, Shape, copy, opening};

/// Requests of a round: some tens of milliseconds, in which a recycler that gives way to guests both works and rests.
const ROUND: u64 = 25_000;

/// Clusters are freed so that the recycler has work; requests go to the others. Rounds with the recycler at work and
/// rounds with it paused take turns, on one handle; only those count in which clusters were moved. It rests during the raw
/// file's rounds, too, in which no guest of its own would keep it from using all of the disk. The library's rounds and the
/// raw file's alternate: who goes on where it was finds more in the processor's caches than who begins.
pub fn recycler(bench: &mut Bench) -> Result<Vec<Line>> {
    let (scale, place) = (bench.scale, &bench.tmpfs);
    let shape = Shape::mapped(scale.size(scale.pick(512 * MIB, 2 * GIB)), 64 << 10, Resident::All);
    shape.make(place, "recycler", &[Raw, Library])?;
    let (units, image) = (shape.stretches(), place.of(Library, "recycler"));
    let mut process = Process::open(Library, &opening(&image))?;
    let offsets = Offsets::Shuffled { units, unit: STRETCH, within: 0, seed: 3, skip: 0 };
    process.run(&Work::new(Kind::Discard, STRETCH as usize, offsets, units / 2))?;
    process.close()?;

    let mut lines = Vec::new();
    for (kind, verb, target) in [(Kind::Read, "read", 1.08), (Kind::Write, "overwrite", 1.10)] {
        let (mut at_work, mut paused) = (Samples::new(), Samples::new());
        for _ in 0..scale.pick(2, 4) {
            for who in [Raw, Library] {
                copy(&place.of(who, "recycler"), &place.of(who, "now"))?;
            }
            let mut field = Field::open(&[Raw, Library], |who| {
                let config = if who == Library { "compact_after_unmaps=1;settle_ms=0;flush_ms=100" } else { "" };
                Ok(Opening { config: config.to_owned(), ..opening(&place.of(who, "now")) })
            })?;
            field.process(Library)?.extra(Extra::Start)?;
            field.process(Library)?.extra(Extra::Pause)?;
            for round in 0..scale.pick(15, 25) {
                let work = |seed| {
                    let offsets =
                        Offsets::AmongLast { units, unit: STRETCH, within: 8192, order: 3, skip: units / 2, seed };
                    Work::new(kind, 4096, offsets, scale.pick(ROUND / 5, ROUND)).warm(200).latencies()
                };
                let raw = field.process(Raw)?.run(&work(round))?;
                let library = field.process(Library)?;
                let before = moved(library)?;
                library.extra(Extra::Resume)?;
                let during = library.run(&work(round))?;
                library.extra(Extra::Pause)?;
                library.extra(Extra::Idle { milliseconds: 20 })?;
                if moved(library)? != before {
                    append(&mut at_work, raw, during);
                }
                let raw = field.process(Raw)?.run(&work(round + 1000))?;
                append(&mut paused, raw, field.process(Library)?.run(&work(round + 1000))?);
            }
            field.close()?;
        }
        let work = format!("random 4 KiB {verb}, recycler moving clusters, {}", place.name);
        if at_work.is_empty() {
            eprintln!("  no cluster was moved during any round of {verb}s");
            continue;
        }
        lines.push(ratios("recycler", &work, &at_work).at_most(target));
        lines.push(ratios("recycler", format!("random 4 KiB {verb}, recycler paused, {}", place.name), &paused));
        let p99 = |samples: &Samples| middle(samples, |done| done.latency.as_ref().map(|latency| latency.p99));
        let worst = |samples: &Samples| middle(samples, |done| done.latency.as_ref().map(|latency| latency.worst));
        for (name, target, of) in
            [("p99", 1.2, &p99 as &dyn Fn(&Samples) -> Option<f64>), ("worst of a round", 3.0, &worst)]
        {
            if let (Some(with), Some(without)) = (of(&at_work), of(&paused)) {
                let line = Line::new("recycler", format!("{work}: {name}"), "× paused");
                lines.push(line.library(with / without).at_most(target));
            }
        }
    }
    Ok(lines)
}

/// What tells whether moves are under way.
fn moved(process: &mut Process) -> Result<(u64, u64)> {
    let stats = process.extra(Extra::Stats)?;
    Ok((stats["moved_bytes"].as_u64().unwrap_or(0), stats["moves"].as_u64().unwrap_or(0)))
}

fn append(all: &mut Samples, raw: Done, library: Done) {
    all.entry(Raw).or_default().push(Some(raw));
    all.entry(Library).or_default().push(Some(library));
}

fn middle(samples: &Samples, of: impl Fn(&Done) -> Option<u64>) -> Option<f64> {
    let rounds = samples.get(&Library)?.iter().flatten();
    let values = rounds.filter_map(|done| Some((done.preempted == 0, of(done)? as f64))).collect();
    Spread::of(undisturbed(values).collect()).map(|spread| spread.median)
}
