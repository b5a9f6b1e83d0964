//! Many requests at once on one thread.

use anyhow::Result;
use bench_work::offsets::Offsets;
use bench_work::protocol::{Kind, Opening, Work};

use super::Bench;
use crate::contender::Contender::{self, ImagoAsync, Library, Qcow2RsUring, Qemu, Raw};
use crate::contender::{Field, Samples, add};
use crate::counts;
use crate::figures::{Line, Spread, ratios};
use crate::place::{MIB, Place, Resident, STRETCH, Shape, WITHIN, drop_from_cache, opening};

const CONTENDERS: [Contender; 5] = [Raw, Library, Qcow2RsUring, ImagoAsync, Qemu];
const DEPTH: usize = 32;
/// Whether the page cache is bypassed, and what is done.
const ROWS: [(bool, Kind, &str); 4] = [
    (false, Kind::Read, "read"),
    (false, Kind::Write, "overwrite"),
    (true, Kind::Read, "read"),
    (true, Kind::Write, "overwrite"),
];

/// Beside a loop on io_uring with the file registered. On a disk: tmpfs hands every request to a thread of the kernel.
pub fn queue(bench: &mut Bench) -> Result<Vec<Line>> {
    let (scale, place) = (bench.scale, &bench.disk);
    // With files of some GiB together, the device is still busy with what they were made of when they are written to.
    let shape = Shape::mapped(scale.size(256 * MIB), 64 << 10, Resident::All);
    let opening = |who, direct| Opening { direct, ..opening(&place.of(who, "queue")) };
    let work = |kind, direct, seed| {
        let offsets = Offsets::Random { units: shape.stretches(), unit: STRETCH, within: WITHIN, seed };
        let count = if direct { scale.pick(320, 640) } else { scale.pick(2_048, 4_096) };
        Work::new(kind, 4096, offsets, count).warm(64).depth(DEPTH)
    };
    let mut samples = [(); ROWS.len()].map(|()| Samples::new());
    for set in 0..scale.sets() {
        place.clear()?;
        // Nobody's file is always the first on the device.
        let mut order = CONTENDERS;
        order.rotate_left(set as usize % CONTENDERS.len());
        shape.make(place, "queue", &order)?;
        for ((direct, kind, verb), samples) in ROWS.into_iter().zip(&mut samples) {
            if direct {
                // Lest requests find pieces of it there, which would have to be written or dropped first.
                CONTENDERS.into_iter().try_for_each(|who| drop_from_cache(&place.of(who, "queue")))?;
            }
            let rounds = if direct { scale.rounds().min(20) } else { scale.rounds() }.div_ceil(scale.sets());
            let measured = Field::open(&CONTENDERS, |who| Ok(opening(who, direct))).and_then(|mut field| {
                let some = field.rounds(rounds, false, |round| work(kind, direct, set << 32 | round))?;
                field.close()?;
                Ok(some)
            });
            match measured {
                Ok(some) => add(samples, some),
                Err(error) => eprintln!("  {}: {error:#}", title(verb, direct, place)),
            }
        }
    }
    let mut lines = Vec::new();
    for ((direct, kind, verb), samples) in ROWS.into_iter().zip(&samples).filter(|(_, samples)| !samples.is_empty()) {
        let title = title(verb, direct, place);
        lines.push(ratios("queue", &title, samples).at_most(1.10));
        let work = Work { count: scale.pick(3_200, 32_000), ..work(kind, direct, 0) };
        lines.extend(counted(&bench.tmpfs, &title, &|who| opening(who, direct), &work)?);
    }
    Ok(lines)
}

fn title(verb: &str, direct: bool, place: &Place) -> String {
    let cache = if direct { "O_DIRECT" } else { "buffered" };
    format!("random 4 KiB {verb}, queue of {DEPTH}, {cache}, {}", place.name)
}

fn counted(traces: &Place, title: &str, opening: &dyn Fn(Contender) -> Opening, work: &Work) -> Result<Vec<Line>> {
    let mut enters = Line::new("queue", format!("{title}: io_uring_enter"), "per operation").at_most(0.1);
    let mut others = Line::new("queue", format!("{title}: other system calls"), "per operation").at_most(0.01);
    for who in [Raw, Library, Qcow2RsUring].into_iter().filter(|who| who.built()) {
        let calls = counts::calls(who, &opening(who), work, &traces.path("trace"))?;
        let entered = calls.by_name.get("io_uring_enter").copied().unwrap_or(0);
        let each = |count: u64| Some(Spread::exact(count as f64 / work.count as f64));
        enters = enters.value(who, each(entered));
        others = others.value(who, each(calls.total() - entered));
    }
    Ok(vec![enters, others])
}
