"""The run's report: one self-contained HTML file with its charts inside."""

from anabranch.simulation.report.page import write_report as write_report
