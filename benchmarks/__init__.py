"""Figures. Threads wait for each other as they do where moe_serve is used, whatever is measured."""

from moe_serve.openmp import wait_shortly

wait_shortly()
