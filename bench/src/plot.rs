//! The ratios as a picture.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::contender::Contender;
use crate::figures::{Line, Target};

const ROW: i32 = 22;
const LABELS: i32 = 470;
const WIDTH: i32 = 1100;
const TOP: i32 = 60;
const LEAST: f64 = 0.1;
const MOST: f64 = 100.0;

fn colour(who: Contender) -> RGBColor {
    match who {
        Contender::Raw => RGBColor(120, 120, 120),
        Contender::Library => RGBColor(200, 30, 30),
        Contender::Qcow2Rs => RGBColor(30, 90, 200),
        Contender::Qcow2RsUring => RGBColor(110, 160, 240),
        Contender::ImagoSync => RGBColor(20, 140, 60),
        Contender::ImagoAsync => RGBColor(120, 200, 120),
        Contender::Qemu => RGBColor(230, 140, 20),
    }
}

/// Where a ratio lies on the logarithmic axis; what is off the axis lies at its end.
fn place(ratio: f64) -> i32 {
    let share = (ratio.clamp(LEAST, MOST) / LEAST).ln() / (MOST / LEAST).ln();
    LABELS + (share * f64::from(WIDTH - LABELS - 20)) as i32
}

/// A row for each line of ratios: a dot for each contender, a bar from quartile to quartile, a tick for the target.
pub fn draw(lines: &[Line], path: &Path) -> Result<()> {
    let ratios: Vec<&Line> = lines.iter().filter(|line| line.unit.starts_with('×')).collect();
    let height = TOP + ROW * (ratios.len() as i32 + 1);
    let area = SVGBackend::new(path, (WIDTH as u32, height as u32)).into_drawing_area();
    picture(&area, &ratios, height).map_err(|error| anyhow!("{}: {error}", path.display()))
}

fn picture(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    lines: &[&Line],
    height: i32,
) -> Result<(), Box<dyn std::error::Error>> {
    let text = |size: i32, colour: RGBColor| ("sans-serif", size).into_font().color(&colour);
    area.fill(&WHITE)?;
    for (number, who) in [
        Contender::Library,
        Contender::Qcow2Rs,
        Contender::Qcow2RsUring,
        Contender::ImagoSync,
        Contender::ImagoAsync,
        Contender::Qemu,
    ]
    .into_iter()
    .enumerate()
    {
        let x = 20 + number as i32 * 150;
        area.draw(&Circle::new((x, 16), 5, colour(who).filled()))?;
        area.draw(&Text::new(who.name(), (x + 10, 10), text(13, BLACK)))?;
    }
    area.draw(&Text::new("| target", (20 + 6 * 150, 10), text(13, BLACK)))?;
    for tick in [0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0] {
        let x = place(tick);
        let shade = if tick == 1.0 { RGBColor(90, 90, 90) } else { RGBColor(225, 225, 225) };
        area.draw(&PathElement::new([(x, TOP - 8), (x, height - ROW)], shade))?;
        area.draw(&Text::new(tick.to_string(), (x - 8, TOP - 24), text(12, BLACK)))?;
    }
    for (number, line) in lines.iter().enumerate() {
        let y = TOP + number as i32 * ROW + ROW / 2;
        area.draw(&Text::new(line.work.clone(), (8, y - 7), text(12, BLACK)))?;
        if let Some(Target::AtMost(bound) | Target::AtLeast(bound)) = line.target {
            let x = place(bound);
            area.draw(&PathElement::new([(x, y - 9), (x, y + 9)], BLACK.stroke_width(2)))?;
        }
        for (&who, spread) in line.values.iter().rev() {
            let (low, high) = ((place(spread.low), y), (place(spread.high), y));
            area.draw(&PathElement::new([low, high], colour(who).stroke_width(2)))?;
            area.draw(&Circle::new((place(spread.median), y), 4, colour(who).filled()))?;
        }
    }
    area.present()?;
    Ok(())
}
